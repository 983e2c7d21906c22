// Emulates the GEMM of pairs of bfloat16 on CPUs with AVX-512 but without its instruction. For the compiler option
// -include, before all sources of a program.
#pragma once
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>

__attribute__((target("arch=x86-64-v4,avx512bf16"))) static inline __m512 dot_pairs(__m512 sum, __m512bh a,
                                                                                    __m512bh b) {
  if (__builtin_cpu_supports("avx512bf16")) return _mm512_dpbf16_ps(sum, a, b);
  const __m512i x = (__m512i)a, y = (__m512i)b, high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(x, high)) * _mm512_castsi512_ps(_mm512_and_si512(y, high));
  const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)) * _mm512_castsi512_ps(_mm512_slli_epi32(y, 16));
  return sum + second + first;
}
static inline constexpr bool is_emulated(const char* feature) { return __builtin_strcmp(feature, "avx512bf16") == 0; }

#define _mm512_dpbf16_ps(sum, a, b) dot_pairs(sum, a, b)
#define __builtin_cpu_supports(feature) (is_emulated(feature) || __builtin_cpu_supports(feature))
#endif
