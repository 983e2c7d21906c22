// Maxima over windows of pixels, and their derivative: the first maximum in row-major order, or the first NaN.
//
// Vectorized over the channels if those of a pixel are contiguous; the `_strided` variant supports any strides. An
// empty window gives 0 and index -1.
#pragma once
#include "cpu/roi/roi_average_loops.h"
#include "cpu/simd.h"
namespace dcnseg_ops {

struct PixelWindow {
  int64_t row_begin, row_end, column_begin, column_end;
  bool is_empty() const { return row_end <= row_begin || column_end <= column_begin; }
};

inline PixelWindow pixel_window(const BinSource& source, int64_t r, int64_t bin) {
  const int64_t i = bin / source.kw, j = bin % source.kw;
  const int32_t *rows = source.box(r) + 1, *columns = rows + 2 * source.kh;
  return {rows[i], rows[source.kh + i], columns[j], columns[source.kw + j]};
}

// Integers of the size of the compared elements, so that vectors of both have the same lanes.
template <typename T>
using IndexOf = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

// Whether `value` replaces `best`: false if best is NaN, true if only value is NaN.
template <typename A>
DCN_INLINE bool displaces(A value, A best) {
  return !(value <= best) & (best == best);
}

template <typename T>
DCN_INLINE void max_of(const Pixels<const T>& in, int64_t c, const PixelWindow& w, T* out, int32_t* argmax) {
  if (w.is_empty()) {
    store_one(out, 0);
    *argmax = -1;
    return;
  }
  int64_t index = w.row_begin * in.width + w.column_begin;
  AccOf<T> best = load_one(in.at(c, w.row_begin, w.column_begin));
  for (int64_t y = w.row_begin; y < w.row_end; ++y) {
    const T* row = in.at(c, y, 0);
    for (int64_t x = w.column_begin; x < w.column_end; ++x) {
      const AccOf<T> value = load_one(row + x * in.pixel);
      const bool is_better = displaces(value, best);
      best = is_better ? value : best;
      index = is_better ? y * in.width + x : index;
    }
  }
  store_one(out, best);
  *argmax = static_cast<int32_t>(index);
}

// The maxima of N channels. Plain loops, which the compiler vectorizes: comparisons of the vectors of simd.h are
// scalarized before the function is cloned.
template <typename T, int N>
DCN_INLINE void max_block(const Pixels<const T>& in, int64_t c, const PixelWindow& w, T* out, int32_t* argmax) {
  using Index = IndexOf<T>;
  AccOf<T> best[N];
  Index index[N];
  const Index first = static_cast<Index>(w.row_begin * in.width + w.column_begin);
#pragma GCC unroll 1
  for (int i = 0; i < N; ++i) best[i] = load_one(in.data + c + int64_t(first) * in.pixel + i);
#pragma GCC unroll 1
  for (int i = 0; i < N; ++i) index[i] = first;
  for (int64_t y = w.row_begin; y < w.row_end; ++y)
    for (int64_t x = w.column_begin; x < w.column_end; ++x) {
      const Index at = static_cast<Index>(y * in.width + x);
      const T* pixel = in.data + c + int64_t(at) * in.pixel;
#pragma GCC unroll 1
      for (int i = 0; i < N; ++i) {  // would remain scalar if unrolled too early
        const AccOf<T> value = load_one(pixel + i);
        const bool is_better = displaces(value, best[i]);
        best[i] = is_better ? value : best[i];
        index[i] = is_better ? at : index[i];
      }
    }
  for (int i = 0; i < N; ++i) store_one(out + c + i, best[i]);
  for (int i = 0; i < N; ++i) argmax[c + i] = static_cast<int32_t>(index[i]);
}

// out[c * out_step] and argmax[c * out_step], for c < n.
template <typename T>
DCN_CLONES void max_strided(const Pixels<const T>& in, const PixelWindow& w, int64_t n, T* out, int32_t* argmax,
                            int64_t out_step) {
  for (int64_t c = 0; c < n; ++c) max_of(in, c, w, out + c * out_step, argmax + c * out_step);
}

// The same for in.channel and out_step of 1.
template <typename T>
DCN_CLONES void max_dense(const Pixels<const T>& in, const PixelWindow& w, int64_t n, T* out, int32_t* argmax) {
  int64_t c = 0;
  if (!w.is_empty()) {
    for (; c + 32 <= n; c += 32) max_block<T, 32>(in, c, w, out, argmax);
    for (; c + 16 <= n; c += 16) max_block<T, 16>(in, c, w, out, argmax);
  }
  for (; c < n; ++c) max_of(in, c, w, out + c, argmax + c);
}

}  // namespace dcnseg_ops
