// 64-byte vectors of the compiler's vector extension: the same source compiles to AVX-512, AVX2 or SSE in the clones
// of a function (DCN_CLONES). Pitfall: only inlined functions are compiled for the instruction set of the clone.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(DCN_CLONES)  // set to nothing by sanitizer builds
#elif defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DCN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DCN_CLONES
#endif
#define DCN_INLINE inline __attribute__((always_inline))
#define DCN_INLINE_LAMBDA __attribute__((always_inline))  // placed after the parameter list

namespace dcnseg_ops {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

typedef float f32x16 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int32_t i32x16 __attribute__((vector_size(64)));

// The type of sums, and the vector that holds values of T in that type.
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

// The conversions of 16-bit floats use integer operations, both for scalars (F float, U uint32_t) and vectors of them.
// They avoid comparisons, which GCC 12 scalarizes before it clones a function.
//
// All bits set where v > limit, else 0; both are less than 2^31.
DCN_INLINE uint32_t exceeds(uint32_t v, uint32_t limit) {
  return static_cast<uint32_t>(static_cast<int32_t>(limit - v) >> 31);
}
DCN_INLINE u32x16 exceeds(u32x16 v, uint32_t limit) { return (u32x16)((i32x16)(limit - v) >> 31); }
template <typename U>
DCN_INLINE U select(U mask, U yes, U no) {
  return (yes & mask) | (no & ~mask);
}
template <typename To, typename From>
DCN_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// bfloat16 is the upper half of a float.
template <typename F, typename U>
DCN_INLINE F float_of(U bits, const bf16*) {
  return bits_as<F>(U(bits << 16));
}
// Rounds to nearest even; NaN stays NaN.
template <typename F, typename U>
DCN_INLINE U bits_of(F value, const bf16*) {
  const U u = bits_as<U>(value), is_nan = exceeds(u & 0x7fffffff, 0x7f800000);
  return select(is_nan, U(0 * u + 0x7fc0), (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// float16 has exponents down to 2^-14; smaller values are multiples of 2^-24.
template <typename F, typename U>
DCN_INLINE F float_of(U bits, const f16*) {
  const U magnitude = bits & 0x7fff;
  // As bits of a float, the value is 2^112 times too small; the multiplication is exact, also for subnormal values.
  const U finite = bits_as<U>(F(bits_as<F>(U(magnitude << 13)) * 0x1p112f));
  const U value = select(exceeds(magnitude, 0x7bff), magnitude << 13 | 0x7f800000, finite);
  return bits_as<F>(U(value | (bits & 0x8000) << 16));
}
// Rounds to nearest even; values out of range become infinite, NaN stays NaN.
template <typename F, typename U>
DCN_INLINE U bits_of(F value, const f16*) {
  const U u = bits_as<U>(value), magnitude = u & 0x7fffffff;
  const U normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // A float in [0.5, 1) is a multiple of 2^-24, so that adding 0.5 rounds to that.
  const U small = bits_as<U>(F(bits_as<F>(magnitude) + 0.5f)) - 0x3f000000;
  U result = select(exceeds(magnitude, (113u << 23) - 1), normal, small);
  result = select(exceeds(magnitude, 0x477fefff), U(0 * u + 0x7c00), result);  // from 65520 on
  result = select(exceeds(magnitude, 0x7f800000), U(0 * u + 0x7e00), result);
  return result | (u >> 16 & 0x8000);
}

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, bf16> || std::is_same_v<T, f16>;

template <typename T>
DCN_INLINE AccOf<T> load_one(const T* p) {
  if constexpr (kIsHalf<T>)
    return float_of<float>(uint32_t(p->bits), p);
  else
    return *p;
}
template <typename T>
DCN_INLINE void store_one(T* p, AccOf<T> v) {
  if constexpr (kIsHalf<T>)
    p->bits = static_cast<uint16_t>(bits_of<float, uint32_t>(v, p));
  else
    *p = v;
}
template <typename T>
DCN_INLINE VecOf<T> load(const T* p) {
  if constexpr (kIsHalf<T>) {
    u16x16 half;
    __builtin_memcpy(&half, p, sizeof half);
    return float_of<f32x16>(__builtin_convertvector(half, u32x16), p);
  } else {
    VecOf<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
}
template <typename T>
DCN_INLINE void store(T* p, VecOf<T> v) {
  if constexpr (kIsHalf<T>) {
    const u16x16 half = __builtin_convertvector(bits_of<f32x16, u32x16>(v, p), u16x16);
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
