// The innermost loop of all GEMMs: a tile of rows times a panel, with the sums in registers.
//
//   c [rows][width] = or += a [rows][depth] * b [depth][width]
//
// `a` has a row stride; `b` is packed and read sequentially. The best tile size depends on the registers of the CPU;
// `microkernel` selects it once. For pairs (bfloat16 with its own instructions) two steps of the depth are adjacent: a
// as is, b [depth/2][width][2]; an odd depth is padded with zeros.
//
// The loop also prefetches part of the next operand, usually the next panel, from `next` on into the L2 cache: one
// cache line per kStepsPerLine steps, which is free, whereas prefetching all at once stalls.
#pragma once
#include <cstdint>
#include "cpu/simd.h"
namespace dcnseg_ops {

constexpr int kMaxTileRows = 14;
constexpr int kMaxTile = kMaxTileRows * 32;  // sums
constexpr int kStepsPerLine = 4;

template <typename E>
struct Microkernel {  // E: element type of a and b; sums are AccOf<E>
  // The width is fixed; the number of rows is 1 to `rows`.
  using Run = void (*)(const E* a, int64_t a_stride, const E* b, int64_t depth, AccOf<E>* c, int64_t c_stride,
                       bool accumulate, const E* next);
  int rows, width;  // rows: maximum per tile; width: a power of two, except for wide microkernels
  bool has_pairs;
  Run run[kMaxTileRows + 1];  // by number of rows; [0] is unused

  // Number of elements that a tile prefetches from `next`.
  int64_t fetched(int64_t depth) const {
    return depth / (has_pairs ? 2 : 1) / kStepsPerLine * (64 / static_cast<int64_t>(sizeof(E)));
  }
};

template <typename E>
const Microkernel<E>& microkernel();

// A microkernel of 1.5 times the width, if there are enough registers, or null. It needs fewer loads per
// multiplication: 1 to 2 % faster, and up to 10 % if another thread runs on the same core.
template <typename E>
const Microkernel<E>* wide_microkernel();

// Whether the GEMM of bfloat16 uses bfloat16 instructions; otherwise it is computed in float.
bool has_bf16_products();

}  // namespace dcnseg_ops
