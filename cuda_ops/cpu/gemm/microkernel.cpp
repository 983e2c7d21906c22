#include "cpu/gemm/microkernel.h"
#include <stdexcept>
#include <utility>
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DCN_X86  // as in simd.h: older compilers use other names for the x86-64 levels
#include <immintrin.h>
#endif
#ifndef DCN_MAX_LEVEL
#define DCN_MAX_LEVEL 4  // of x86-64; lower in test builds, to run the code of other CPUs
#endif
namespace dcnseg_ops {
namespace {

constexpr int kAhead = 8;  // prefetch distance of narrow panels in steps of the depth: 2 % faster

typedef double f64x4 __attribute__((vector_size(32)));
typedef double f64x2 __attribute__((vector_size(16)));

template <typename V>
DCN_INLINE V load_vector(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename V, int kRows, int kVectors, typename E>
DCN_INLINE void store_tile(V (&sum)[kRows][kVectors], E* c, int64_t c_stride, bool accumulate) {
  constexpr int kLanes = sizeof(V) / sizeof(E);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      E* to = c + r * c_stride + v * kLanes;
      if (accumulate) sum[r][v] += load_vector<V>(to);
      __builtin_memcpy(to, &sum[r][v], sizeof(V));
    }
}

// Prefetches the elements of c that store_tile adds to into the L1 cache, line by line: all at once would delay the
// loads of the GEMM.
template <int kRows, int kLines, typename E>
struct TileLines {
  const E* next;
  int64_t stride;
  int left = kRows * kLines;

  DCN_INLINE void fetch_one() {
    constexpr int kLine = 64 / sizeof(E);
    __builtin_prefetch(next, 1);
    next += --left % kLines ? kLine : stride - (kLines - 1) * kLine;
  }
};

// One step of the depth: sum += column of a times row of b, then advances both. Rows are addressed relative to every
// third one: base, base + stride and base + 2 * stride are addressing modes of one instruction, and five bases fit in
// the registers where fourteen do not.
template <typename V, int kRows, int kVectors, bool kFetches, int kBases, typename E>
DCN_INLINE void step(const E* (&base)[kBases], int64_t a_stride, const E*& b, V (&sum)[kRows][kVectors]) {
  constexpr int kLanes = sizeof(V) / sizeof(E);
  V right[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    right[v] = load_vector<V>(b + v * kLanes);
    if constexpr (kFetches) __builtin_prefetch(b + (kAhead * kVectors + v) * kLanes);
  }
  b += kVectors * kLanes;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const E left = base[r / 3][r % 3 * a_stride];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
  }
#pragma GCC unroll 5
  for (int i = 0; i < kBases; ++i) ++base[i];
}

template <typename V, int kRows, int kVectors, bool kFetches, typename E>
DCN_INLINE void tile(const E* a, int64_t a_stride, const E* b, int64_t depth, E* c, int64_t c_stride, bool accumulate,
                     const E* next) {
  constexpr int kBases = (kRows + 2) / 3;
  V sum[kRows][kVectors] = {};
  const E* base[kBases];
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * a_stride;
  TileLines<kRows, kVectors * sizeof(V) / 64, E> lines{c, c_stride};
  int64_t left_over = depth;
  const auto few_steps = [&]() DCN_INLINE_LAMBDA {
    __builtin_prefetch(next, 0, 2);
    next += 64 / sizeof *next;
#pragma GCC unroll 4
    for (int i = 0; i < kStepsPerLine; ++i) step<V, kRows, kVectors, kFetches>(base, a_stride, b, sum);
    left_over -= kStepsPerLine;
  };
  for (; lines.left > 0 && left_over >= kStepsPerLine; lines.fetch_one()) few_steps();
  while (left_over >= kStepsPerLine) few_steps();
  for (; left_over > 0; --left_over) step<V, kRows, kVectors, kFetches>(base, a_stride, b, sum);
  store_tile(sum, c, c_stride, accumulate);
}

// kFetches: whether to prefetch the panel, which is slower than not to if there are few rows.
#define DCN_TILE(name, target, V, kVectors, kFetches, E)                                                             \
  template <int kRows>                                                                                               \
  target void name(const E* a, int64_t a_stride, const E* b, int64_t depth, E* c, int64_t c_stride, bool accumulate, \
                   const E* next) {                                                                                  \
    tile<V, kRows, kVectors, kFetches>(a, a_stride, b, depth, c, c_stride, accumulate, next);                        \
  }

#if defined(DCN_X86)
#define DCN_V4 __attribute__((target("arch=x86-64-v4")))
#define DCN_V3 __attribute__((target("arch=x86-64-v3")))
DCN_TILE(tile_v4, DCN_V4, f32x16, 2, true, float)
DCN_TILE(tile_v4, DCN_V4, f64x8, 2, true, double)
DCN_TILE(wide_tile_v4, DCN_V4, f32x16, 3, false, float)
DCN_TILE(wide_tile_v4, DCN_V4, f64x8, 3, false, double)
DCN_TILE(tile_v3, DCN_V3, f32x8, 2, true, float)
DCN_TILE(tile_v3, DCN_V3, f64x4, 2, true, double)

// GEMM of pairs of bfloat16 with sums in float.
#define DCN_PAIRS __attribute__((target("arch=x86-64-v4,avx512bf16")))
template <int kRows, int kVectors, int kBases>
DCN_PAIRS DCN_INLINE void step_of_pairs(const bf16* (&base)[kBases], int64_t a_stride, const bf16*& b,
                                        __m512 (&sum)[kRows][kVectors]) {
  __m512bh right[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    right[v] = (__m512bh)_mm512_loadu_si512(b + v * 32);
    __builtin_prefetch(b + (kAhead * kVectors + v) * 32);
  }
  b += kVectors * 32;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    int32_t pair;
    __builtin_memcpy(&pair, base[r / 3] + r % 3 * a_stride, 4);
    const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
  }
#pragma GCC unroll 5
  for (int i = 0; i < kBases; ++i) base[i] += 2;
}
template <int kRows>
DCN_PAIRS void tile_pairs(const bf16* a, int64_t a_stride, const bf16* b, int64_t depth, float* c, int64_t c_stride,
                          bool accumulate, const bf16* next) {
  constexpr int kBases = (kRows + 2) / 3;
  __m512 sum[kRows][2] = {};
  const bf16* base[kBases];
  for (int i = 0; i < kBases; ++i) base[i] = a + 3 * i * a_stride;
  TileLines<kRows, 2, float> lines{c, c_stride};
  int64_t left_over = depth / 2;
  const auto few_steps = [&]() DCN_PAIRS DCN_INLINE_LAMBDA {
    __builtin_prefetch(next, 0, 2);
    next += 64 / sizeof *next;
#pragma GCC unroll 4
    for (int i = 0; i < kStepsPerLine; ++i) step_of_pairs(base, a_stride, b, sum);
    left_over -= kStepsPerLine;
  };
  for (; lines.left > 0 && left_over >= kStepsPerLine; lines.fetch_one()) few_steps();
  while (left_over >= kStepsPerLine) few_steps();
  for (; left_over > 0; --left_over) step_of_pairs(base, a_stride, b, sum);
  store_tile(sum, c, c_stride, accumulate);
}
#endif
DCN_TILE(tile_plain, , f32x4, 4, true, float)
DCN_TILE(tile_plain, , f64x2, 4, true, double)

// The kernels of one tile function by number of rows.
#define DCN_KERNELS(name, tile)                                                                    \
  template <typename E, int... kRows>                                                              \
  Microkernel<E> name(size_t width, bool has_pairs, std::integer_sequence<int, kRows...>) {        \
    return {sizeof...(kRows), static_cast<int>(width), has_pairs, {nullptr, &tile<kRows + 1>...}}; \
  }
#if defined(DCN_X86)
DCN_KERNELS(kernels_v4, tile_v4)
DCN_KERNELS(wide_kernels_v4, wide_tile_v4)
DCN_KERNELS(kernels_v3, tile_v3)
DCN_KERNELS(kernels_pairs, tile_pairs)
#endif
DCN_KERNELS(kernels_plain, tile_plain)

template <int kRows>
using Rows = std::make_integer_sequence<int, kRows>;

// The best microkernel for x86-64-v`max_level` or lower.
template <typename E>
Microkernel<E> pick_kernel([[maybe_unused]] int max_level) {
#if defined(DCN_X86)
  if (max_level >= 4 && __builtin_cpu_supports("x86-64-v4")) return kernels_v4<E>(128 / sizeof(E), false, Rows<14>());
  if (max_level >= 3 && __builtin_cpu_supports("x86-64-v3")) return kernels_v3<E>(64 / sizeof(E), false, Rows<6>());
#endif
#if defined(__aarch64__)
  return kernels_plain<E>(64 / sizeof(E), false,
                          Rows<6>());  // 24 of 32 registers hold sums
#else
  return kernels_plain<E>(64 / sizeof(E), false, Rows<2>());  // 8 of 16
#endif
}

// pick_kernel for wide microkernels; null if there is none.
template <typename E>
const Microkernel<E>* wide_kernel() {
#if defined(DCN_X86)
  static const Microkernel<E> kernel = wide_kernels_v4<E>(192 / sizeof(E), false, Rows<8>());
  if (DCN_MAX_LEVEL >= 4 && __builtin_cpu_supports("x86-64-v4")) return &kernel;
#endif
  return nullptr;
}

}  // namespace

template <>
const Microkernel<float>& microkernel<float>() {
  static const Microkernel<float> kernel = pick_kernel<float>(DCN_MAX_LEVEL);
  return kernel;
}
template <>
const Microkernel<double>& microkernel<double>() {
  static const Microkernel<double> kernel = pick_kernel<double>(DCN_MAX_LEVEL);
  return kernel;
}
template <>
const Microkernel<bf16>& microkernel<bf16>() {
#if defined(DCN_X86)
  static const Microkernel<bf16> kernel = kernels_pairs<bf16>(32, true, Rows<14>());
  return kernel;
#else
  throw std::logic_error("has_bf16_products() was not asked");
#endif
}

template <>
const Microkernel<float>* wide_microkernel<float>() {
  return wide_kernel<float>();
}
template <>
const Microkernel<double>* wide_microkernel<double>() {
  return wide_kernel<double>();
}
template <>
const Microkernel<bf16>* wide_microkernel<bf16>() {
  return nullptr;
}

bool has_bf16_products() {
#if defined(DCN_X86)
  return DCN_MAX_LEVEL >= 4 && __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace dcnseg_ops
