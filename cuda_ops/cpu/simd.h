// Vectors of 64 bytes in the compiler's own vector extension: the same source becomes AVX-512, AVX2 or SSE code
// in the clones of a function (DCN_CLONES). Trap: only functions that are inlined take over the instruction set
// of the clone.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(DCN_CLONES)  // a sanitizer's build, which sets it to nothing
#elif defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DCN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DCN_CLONES
#endif
#define DCN_INLINE inline __attribute__((always_inline))

namespace dcnseg_ops {

struct bf16 {
  uint16_t bits;
};

typedef float f32x16 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

// The type that sums are kept in, and the vector that holds values of T in that type.
template <typename T>
struct Simd {
  using Acc = float;
  using Vec = f32x16;
  static constexpr int kLanes = 16;
};
template <>
struct Simd<double> {
  using Acc = double;
  using Vec = f64x8;
  static constexpr int kLanes = 8;
};
template <typename T>
using AccOf = typename Simd<T>::Acc;
template <typename T>
using VecOf = typename Simd<T>::Vec;

template <typename T>
DCN_INLINE AccOf<T> load_one(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint32_t u = uint32_t(p->bits) << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
  } else {
    return *p;
  }
}
template <typename T>
DCN_INLINE void store_one(T* p, AccOf<T> v) {
  if constexpr (std::is_same_v<T, bf16>) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t u;
    __builtin_memcpy(&u, &v, 4);
    p->bits = v == v ? uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
  } else {
    *p = v;
  }
}
template <typename T>
DCN_INLINE VecOf<T> load(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    u16x16 half;
    __builtin_memcpy(&half, p, sizeof half);
    const u32x16 u = __builtin_convertvector(half, u32x16) << 16;
    return (f32x16)u;
  } else {
    VecOf<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
}
// Rounded to bfloat16, in the upper half of each number.
DCN_INLINE u32x16 round_to_upper_half(f32x16 v) {
  const u32x16 u = (u32x16)v;
  const u32x16 rounded = u + 0x7fff + ((u >> 16) & 1);
  const u32x16 is_number = (u32x16)(v == v);
  return (rounded & is_number & 0xffff0000) | (0x7fc00000 & ~is_number);
}
template <typename T>
DCN_INLINE void store(T* p, VecOf<T> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    const u16x16 half = __builtin_convertvector(round_to_upper_half(v) >> 16, u16x16);
    __builtin_memcpy(p, &half, sizeof half);
  } else {
    __builtin_memcpy(p, &v, sizeof v);
  }
}
template <typename A>
struct Quad {
  A of[4];
};

typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));

#if defined(__clang__)
#define DCN_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define DCN_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, i32x4{i, j, k, l})
typedef int32_t i32x4 __attribute__((vector_size(16)));
#endif

DCN_INLINE f32x4 fold(f32x16 v) {
  f32x8 h[2];
  __builtin_memcpy(h, &v, sizeof v);
  const f32x8 half = h[0] + h[1];
  f32x4 q[2];
  __builtin_memcpy(q, &half, sizeof half);
  return q[0] + q[1];
}
// The sums over the lanes of four vectors, in a fixed order, so that every run gives the same bits.
DCN_INLINE Quad<float> sum_lanes(f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
  const f32x4 fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
  const f32x4 ab = DCN_SHUFFLE(fa, fb, 0, 4, 1, 5) + DCN_SHUFFLE(fa, fb, 2, 6, 3, 7);
  const f32x4 cd = DCN_SHUFFLE(fc, fd, 0, 4, 1, 5) + DCN_SHUFFLE(fc, fd, 2, 6, 3, 7);
  const f32x4 sums = DCN_SHUFFLE(ab, cd, 0, 1, 4, 5) + DCN_SHUFFLE(ab, cd, 2, 3, 6, 7);
  Quad<float> out;
  __builtin_memcpy(&out, &sums, sizeof sums);
  return out;
}
DCN_INLINE double sum_lanes(f64x8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
DCN_INLINE Quad<double> sum_lanes(f64x8 a, f64x8 b, f64x8 c, f64x8 d) {
  return {{sum_lanes(a), sum_lanes(b), sum_lanes(c), sum_lanes(d)}};
}

}  // namespace dcnseg_ops
