// Transposes of row-major matrices, in blocks of 16 x 16 elements in vector registers.
#pragma once
#include <algorithm>
#include "cpu/simd.h"
namespace dcnseg_ops {

// 16 elements of 4 bytes, or of 2 bytes widened to 4.
template <typename T>
DCN_INLINE u32x16 load_bits(const T* p) {
  if constexpr (sizeof(T) == 2) {
    u16x16 half;
    __builtin_memcpy(&half, p, sizeof half);
    return __builtin_convertvector(half, u32x16);
  } else {
    u32x16 v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
}
template <typename T>
DCN_INLINE void store_bits(T* p, u32x16 v) {
  if constexpr (sizeof(T) == 2) {
    const u16x16 half = __builtin_convertvector(v, u16x16);
    __builtin_memcpy(p, &half, sizeof half);
  } else {
    __builtin_memcpy(p, &v, sizeof v);
  }
}

#if defined(__clang__)
#define DCN_SHUFFLE16(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DCN_SHUFFLE16(a, b, ...) __builtin_shuffle(a, b, i32x16{__VA_ARGS__})
#endif

// Rows i and i + S swap the off-diagonal halves of each 2S x 2S block.
template <int S>
DCN_INLINE void exchange(u32x16& a, u32x16& b) {
  const u32x16 x = a, y = b;
  if constexpr (S == 8) {
    a = DCN_SHUFFLE16(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    b = DCN_SHUFFLE16(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  } else if constexpr (S == 4) {
    a = DCN_SHUFFLE16(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    b = DCN_SHUFFLE16(x, y, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  } else if constexpr (S == 2) {
    a = DCN_SHUFFLE16(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    b = DCN_SHUFFLE16(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  } else {
    a = DCN_SHUFFLE16(x, y, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    b = DCN_SHUFFLE16(x, y, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
}
template <int S>
DCN_INLINE void exchange_all(u32x16 (&r)[16]) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (!(i & S)) exchange<S>(r[i], r[i + S]);
}

template <typename T>
DCN_INLINE void transpose_16x16(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  u32x16 v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = load_bits(in + i * in_stride);
  exchange_all<8>(v);
  exchange_all<4>(v);
  exchange_all<2>(v);
  exchange_all<1>(v);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store_bits(out + i * out_stride, v[i]);
}

// out[c][r] = in[r][c] for r < rows and c < columns; strides are those of consecutive rows. The rows of `out` are
// written sequentially, 16 at a time: the other order took twice as long for short rows. The next lines to write are
// prefetched, because a store that misses the cache waits for its line: without, it took up to 1.8 times as long. The
// next columns to read are prefetched because the hardware does not track so many rows.
template <typename T>
DCN_CLONES void transpose_block(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t rows,
                                int64_t columns) {
  int64_t c = 0;
  if constexpr (sizeof(T) <= 4) {
    for (; c + 16 <= columns; c += 16) {
      int64_t r = 0;
      for (; r + 16 <= rows; r += 16) {
        for (int64_t i = c; i < c + 16; ++i) __builtin_prefetch(out + i * out_stride + r + 16, 1);
        for (int64_t i = r; i < r + 16; ++i) __builtin_prefetch(in + i * in_stride + c + 16);
        transpose_16x16(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
      }
      for (; r < rows; ++r)
        for (int64_t i = c; i < c + 16; ++i) out[i * out_stride + r] = in[r * in_stride + i];
    }
  }
  for (; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r) out[c * out_stride + r] = in[r * in_stride + c];
}

// transpose_block for a dense matrix of few columns, [rows][columns]: a vector load extends beyond the end of its row
// into the next rows.
template <typename T>
DCN_CLONES void transpose_narrow(const T* in, T* out, int64_t out_stride, int64_t rows, int64_t columns) {
  int64_t r = 0;
  if constexpr (sizeof(T) <= 4) {
    for (; columns < 16 && (r + 15) * columns + 16 <= rows * columns; r += 16) {
      u32x16 v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) v[i] = load_bits(in + (r + i) * columns);
      exchange_all<8>(v);
      exchange_all<4>(v);
      exchange_all<2>(v);
      exchange_all<1>(v);
      for (int64_t c = 0; c < columns; ++c) store_bits(out + c * out_stride + r, v[c]);
    }
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = in[r * columns + c];
}

}  // namespace dcnseg_ops
