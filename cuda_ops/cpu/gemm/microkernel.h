// The innermost loop of every product here: a tile of rows times a panel, kept in registers.
//
//   c [rows][width] = or += a [rows][depth] * b [depth][width]
//
// `a` is read row by row with a stride, as it lies; `b` is packed, so that it is read from front to end. Which
// tile is best depends on the registers of the machine: `microkernel` picks it once. For pairs (bfloat16 with
// its own instructions) two steps of the depth lie side by side: a as it lies, b [depth/2][width][2]; an odd
// depth is filled up with zeros.
//
// Meanwhile a part of what is read next, as a rule of the next panel, comes from `next` on into the second cache: a
// line for every kStepsPerLine steps of the loop, which costs nothing there, while fetching all at once stalls.
#pragma once
#include <cstdint>
#include "cpu/simd.h"
namespace dcnseg_ops {

constexpr int kMostTileRows = 14;
constexpr int kMostTile = kMostTileRows * 32;  // sums
constexpr int kStepsPerLine = 4;

template <typename E>
struct Microkernel {  // E: element of a and b; sums are in AccOf<E>
  // The width is fixed; of the rows there may be 1 to `rows`.
  using Run = void (*)(const E* a, int64_t a_stride, const E* b, int64_t depth, AccOf<E>* c, int64_t c_stride,
                       bool accumulate, const E* next);
  int rows, width;  // rows: the most of a tile; width: a power of two, but for a wide one
  bool has_pairs;
  Run run[kMostTileRows + 1];  // by the number of rows; [0] is unused

  // How many numbers from `next` on a tile fetches.
  int64_t fetched(int64_t depth) const {
    return depth / (has_pairs ? 2 : 1) / kStepsPerLine * (64 / static_cast<int64_t>(sizeof(E)));
  }
};

template <typename E>
const Microkernel<E>& microkernel();

// A microkernel that is half as wide again, where the registers suffice for it, or null. It loads less for as many
// products: 1 to 2 % faster, and up to 10 % where another thread runs on the same core.
template <typename E>
const Microkernel<E>* wide_microkernel();

// Whether products of bfloat16 run in instructions of their own; else they are computed in float.
bool has_bf16_products();

}  // namespace dcnseg_ops
