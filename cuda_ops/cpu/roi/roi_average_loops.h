// Weighted means over windows of pixels, and their derivatives with respect to the pixels and the shift of the window.
//
// If the channels of a pixel are contiguous, the loops are vectorized over them; the `_strided` variants support any
// strides. Both add in the same order: columns of a row, then rows. Functions marked DCN_CLONES are compiled once per
// instruction set; everything they call is inlined.
#pragma once
#include "cpu/roi/roi_windows.h"
#include "cpu/simd.h"
namespace dcnseg_ops {

template <typename T>
struct Pixels {  // one image; channel c of pixel (y, x) is data[c * channel + (y * width + x) * pixel]
  T* data;
  int64_t channel, pixel, width;

  DCN_INLINE T* at(int64_t c, int64_t y, int64_t x) const { return data + c * channel + (y * width + x) * pixel; }
};

// `Unit`: in.pixel is 1, known at compile time.
template <bool Unit = false, typename T>
DCN_INLINE AccOf<T> mean_of(const Pixels<const T>& in, int64_t c, const Window<AccOf<T>>& w) {
  using A = AccOf<T>;
  const int64_t step = Unit ? 1 : in.pixel;
  A sum = 0;
  for (int64_t y = 0; y < w.rows.count; ++y) {
    const T* row = in.at(c, w.rows.data[y].index, 0);
    A part = 0;
    for (int64_t x = 0; x < w.columns.count; ++x)
      part += w.columns.data[x].weight * load_one(row + w.columns.data[x].index * step);
    sum += w.rows.data[y].weight * part;
  }
  return sum / w.divisor;
}

template <typename T, int V>
DCN_INLINE void mean_vectors(const Pixels<const T>& in, int64_t c, const Window<AccOf<T>>& w, T* out) {
  constexpr int kLanes = Simd<T>::kLanes;
  VecOf<T> sum[V] = {};
  for (int64_t y = 0; y < w.rows.count; ++y) {
    const T* row = in.data + c + w.rows.data[y].index * in.width * in.pixel;
    VecOf<T> part[V] = {};
    for (int64_t x = 0; x < w.columns.count; ++x) {
      const T* pixel = row + w.columns.data[x].index * in.pixel;
      for (int v = 0; v < V; ++v) part[v] += w.columns.data[x].weight * load(pixel + v * kLanes);
    }
    for (int v = 0; v < V; ++v) sum[v] += w.rows.data[y].weight * part[v];
  }
  for (int v = 0; v < V; ++v) store(out + c + v * kLanes, sum[v] / w.divisor);
}

// out[c * out_step] = mean of channel c, for c < n.
template <typename T>
DCN_CLONES void mean_strided(const Pixels<const T>& in, const Window<AccOf<T>>& w, int64_t n, T* out,
                             int64_t out_step) {
  if (in.pixel == 1)
    for (int64_t c = 0; c < n; ++c) store_one(out + c * out_step, mean_of<true>(in, c, w));
  else
    for (int64_t c = 0; c < n; ++c) store_one(out + c * out_step, mean_of(in, c, w));
}

// The same for in.channel and out_step of 1.
template <typename T>
DCN_CLONES void mean(const Pixels<const T>& in, const Window<AccOf<T>>& w, int64_t n, T* out) {
  constexpr int kLanes = Simd<T>::kLanes;
  int64_t c = 0;
  for (; c + 4 * kLanes <= n; c += 4 * kLanes) mean_vectors<T, 4>(in, c, w, out);
  for (; c + kLanes <= n; c += kLanes) mean_vectors<T, 1>(in, c, w, out);
  for (; c < n; ++c) store_one(out + c, mean_of(in, c, w));
}

template <bool Unit = false, typename A>
DCN_INLINE void spread_one(const Pixels<A>& sums, int64_t c, const Window<A>& w, A grad) {
  const int64_t step = Unit ? 1 : sums.pixel;
  for (int64_t y = 0; y < w.rows.count; ++y) {
    A* row = sums.at(c, w.rows.data[y].index, 0);
    const A row_grad = grad * w.rows.data[y].weight;
    for (int64_t x = 0; x < w.columns.count; ++x)
      row[w.columns.data[x].index * step] += row_grad * w.columns.data[x].weight;
  }
}

// sums += weight * grad / divisor at the pixels of the window; grad[c * grad_step] belongs to channel c.
template <typename T>
DCN_CLONES void spread_strided(const Pixels<AccOf<T>>& sums, const Window<AccOf<T>>& w, int64_t n, const T* grad,
                               int64_t grad_step) {
  if (sums.pixel == 1)
    for (int64_t c = 0; c < n; ++c) spread_one<true>(sums, c, w, load_one(grad + c * grad_step) / w.divisor);
  else
    for (int64_t c = 0; c < n; ++c) spread_one(sums, c, w, load_one(grad + c * grad_step) / w.divisor);
}

template <typename T, int V>
DCN_INLINE void spread_vectors(const Pixels<AccOf<T>>& sums, int64_t c, const Window<AccOf<T>>& w, const T* grad) {
  using A = AccOf<T>;
  constexpr int kLanes = Simd<T>::kLanes;
  VecOf<T> g[V];
  for (int v = 0; v < V; ++v) g[v] = load(grad + c + v * kLanes) / w.divisor;
  for (int64_t y = 0; y < w.rows.count; ++y) {
    A* row = sums.data + c + w.rows.data[y].index * sums.width * sums.pixel;
    VecOf<T> row_grad[V];
    for (int v = 0; v < V; ++v) row_grad[v] = g[v] * w.rows.data[y].weight;
    for (int64_t x = 0; x < w.columns.count; ++x) {
      A* pixel = row + w.columns.data[x].index * sums.pixel;
      for (int v = 0; v < V; ++v)
        store(pixel + v * kLanes, load(pixel + v * kLanes) + w.columns.data[x].weight * row_grad[v]);
    }
  }
}

// spread_strided for sums.channel and grad_step of 1.
template <typename T>
DCN_CLONES void spread(const Pixels<AccOf<T>>& sums, const Window<AccOf<T>>& w, int64_t n, const T* grad) {
  constexpr int kLanes = Simd<T>::kLanes;
  int64_t c = 0;
  for (; c + 4 * kLanes <= n; c += 4 * kLanes) spread_vectors<T, 4>(sums, c, w, grad);
  for (; c + kLanes <= n; c += kLanes) spread_vectors<T, 1>(sums, c, w, grad);
  for (; c < n; ++c) spread_one(sums, c, w, load_one(grad + c) / w.divisor);
}

template <typename A>
struct ShiftGrad {
  A y = 0, x = 0;
};

// Adds the derivatives of channel c with respect to the shift, before the division.
template <typename T>
DCN_INLINE void add_slopes(const Pixels<const T>& in, int64_t c, const Window<AccOf<T>>& w, AccOf<T> grad,
                           ShiftGrad<AccOf<T>>& out) {
  using A = AccOf<T>;
  A by_y = 0, by_x = 0;
  for (int64_t y = 0; y < w.rows.count; ++y) {
    const T* row = in.at(c, w.rows.data[y].index, 0);
    A part = 0, slope = 0;
    for (int64_t x = 0; x < w.columns.count; ++x) {
      const A value = load_one(row + w.columns.data[x].index * in.pixel);
      part += w.columns.data[x].weight * value;
      slope += w.columns.data[x].slope * value;
    }
    by_y += w.rows.data[y].slope * part;
    by_x += w.rows.data[y].weight * slope;
  }
  out.y += grad * by_y;
  out.x += grad * by_x;
}

// Sum over n channels of grad * (derivative of the mean with respect to the shift).
template <typename T>
DCN_CLONES ShiftGrad<AccOf<T>> slopes_strided(const Pixels<const T>& in, const Window<AccOf<T>>& w, int64_t n,
                                              const T* grad, int64_t grad_step) {
  ShiftGrad<AccOf<T>> out;
  if (w.is_empty()) n = 0;  // so that a NaN gradient has no effect
  for (int64_t c = 0; c < n; ++c) add_slopes(in, c, w, load_one(grad + c * grad_step), out);
  return {out.y / w.divisor, out.x / w.divisor};
}

template <typename T, int V>
DCN_INLINE void slope_vectors(const Pixels<const T>& in, int64_t c, const Window<AccOf<T>>& w, const T* grad,
                              VecOf<T>& sum_y, VecOf<T>& sum_x) {
  constexpr int kLanes = Simd<T>::kLanes;
  VecOf<T> by_y[V] = {}, by_x[V] = {};
  for (int64_t y = 0; y < w.rows.count; ++y) {
    const T* row = in.data + c + w.rows.data[y].index * in.width * in.pixel;
    VecOf<T> part[V] = {}, slope[V] = {};
    for (int64_t x = 0; x < w.columns.count; ++x) {
      const Tap<AccOf<T>>& tap = w.columns.data[x];
      for (int v = 0; v < V; ++v) {
        const VecOf<T> value = load(row + tap.index * in.pixel + v * kLanes);
        part[v] += tap.weight * value;
        slope[v] += tap.slope * value;
      }
    }
    for (int v = 0; v < V; ++v) {
      by_y[v] += w.rows.data[y].slope * part[v];
      by_x[v] += w.rows.data[y].weight * slope[v];
    }
  }
  for (int v = 0; v < V; ++v) {
    const VecOf<T> g = load(grad + c + v * kLanes);
    sum_y += g * by_y[v];
    sum_x += g * by_x[v];
  }
}

// slopes_strided for in.channel and grad_step of 1.
template <typename T>
DCN_CLONES ShiftGrad<AccOf<T>> slopes(const Pixels<const T>& in, const Window<AccOf<T>>& w, int64_t n, const T* grad) {
  constexpr int kLanes = Simd<T>::kLanes;
  VecOf<T> sum_y = {}, sum_x = {};
  if (w.is_empty()) n = 0;
  int64_t c = 0;
  for (; c + 2 * kLanes <= n; c += 2 * kLanes) slope_vectors<T, 2>(in, c, w, grad, sum_y, sum_x);
  for (; c + kLanes <= n; c += kLanes) slope_vectors<T, 1>(in, c, w, grad, sum_y, sum_x);
  const Quad<AccOf<T>> sums = sum_lanes(sum_y, sum_x, VecOf<T>{}, VecOf<T>{});
  ShiftGrad<AccOf<T>> out{sums.of[0], sums.of[1]};
  for (; c < n; ++c) add_slopes(in, c, w, load_one(grad + c), out);
  return {out.y / w.divisor, out.x / w.divisor};
}

// The part of a window with rows in [begin, end), relative to `begin`; `rows` stores them.
template <typename A>
Window<A> clip_rows(const Window<A>& w, int64_t begin, int64_t end, std::vector<Tap<A>>& rows) {
  rows.clear();
  for (int64_t y = 0; y < w.rows.count; ++y) {
    const Tap<A>& tap = w.rows.data[y];
    if (tap.index >= begin && tap.index < end)
      rows.push_back({static_cast<int32_t>(tap.index - begin), tap.weight, tap.slope});
  }
  return {{rows.data(), static_cast<int64_t>(rows.size())}, w.columns, w.divisor};
}

}  // namespace dcnseg_ops
