// Copies between torch's memory orders and the row-major matrices of the GEMMs, in parallel.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include "deform_conv_params.h"
#include "simd.h"
#include "torch_c_abi.h"
namespace dcnseg_ops {

template <typename T>
struct Buffer {  // uninitialised memory, aligned to cache lines
  struct Free { void operator()(T* p) const { std::free(p); } };
  std::unique_ptr<T, Free> memory;
  T* get(int64_t count) {
    if (!memory) {
      const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
      memory.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (!memory) throw std::bad_alloc();
    }
    return memory.get();
  }
};

struct Strides4 {
  int64_t s[4];
  explicit Strides4(const Tensor& t) { for (int i = 0; i < 4; ++i) s[i] = t.strides()[i]; }
};

// Whether a [n0, n1, n2, n3] tensor lies in memory as [n0, n2, n3, n1] without gaps.
inline bool is_channels_last(const Tensor& t) {
  const int64_t *n = t.sizes(), *s = t.strides();
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (n[d] != 1 && s[d] != expected) return false;
    expected *= n[d];
  }
  return true;
}

inline std::vector<int64_t> channels_last_strides(const std::vector<int64_t>& n) {
  return {n[1] * n[2] * n[3], 1, n[3] * n[1], n[1]};
}

// Elements that one thread should have at least.
inline int64_t grain(int64_t elements_per_item) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_item)); }

// Weight [C_out, C/groups, kh, kw] to rows [C_out][T][C/groups]; itself if it lies so.
template <typename T>
const T* weight_rows(const DeformConvParams& p, const Tensor& weight, Buffer<T>& buffer) {
  if (is_channels_last(weight)) return weight.in<T>();
  const T* from = weight.in<T>();
  const Strides4 s(weight);
  T* to = buffer.get(p.out_channels * p.depth());
  parallel_for(0, p.out_channels, grain(p.depth()), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t t = 0; t < p.taps(); ++t) {
        const T* source = from + o * s.s[0] + t / p.kernel_w * s.s[2] + t % p.kernel_w * s.s[3];
        T* row = to + (o * p.taps() + t) * p.group_channels();
        for (int64_t c = 0; c < p.group_channels(); ++c) row[c] = source[c * s.s[1]];
      }
  });
  return to;
}

// out [groups][columns][rows] = in [groups][rows][columns], in squares that fit the cache.
template <typename T>
void transpose(const T* in, T* out, int64_t groups, int64_t rows, int64_t columns) {
  constexpr int64_t kSide = 32;
  const int64_t strips = (columns + kSide - 1) / kSide;
  parallel_for(0, groups * strips, grain(rows * kSide), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / strips, c0 = item % strips * kSide, c1 = std::min(columns, c0 + kSide);
      const T* from = in + group * rows * columns;
      T* to = out + group * rows * columns;
      for (int64_t r0 = 0; r0 < rows; r0 += kSide)
        for (int64_t c = c0; c < c1; ++c)
          for (int64_t r = r0, r1 = std::min(rows, r0 + kSide); r < r1; ++r) to[c * rows + r] = from[r * columns + c];
    }
  });
}

// Gradient rows [groups][tile][C_out/groups] of positions [begin, begin + tile) of grad
// [B, C_out, H_out, W_out], which may have any strides, 0 too.
template <typename T>
const T* gradient_rows(const DeformConvParams& p, const Tensor& grad, int64_t begin, int64_t tile, Buffer<T>& buffer, int64_t capacity) {
  const T* from = grad.in<T>();
  if (p.groups == 1 && is_channels_last(grad)) return from + begin * p.out_channels;
  const Strides4 s(grad);
  const int64_t n = p.group_outputs();
  constexpr int64_t kSide = 32;
  T* to = buffer.get(capacity * p.out_channels);
  parallel_for(0, (tile + kSide - 1) / kSide, grain(kSide * p.out_channels), [&](int64_t block_begin, int64_t block_end) {
    int64_t source[kSide];
    for (int64_t block = block_begin; block < block_end; ++block) {
      const int64_t first = block * kSide, count = std::min(kSide, tile - first);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t position = begin + first + j, pixel = position % p.out_pixels();
        source[j] = position / p.out_pixels() * s.s[0] + pixel / p.out_width * s.s[2] + pixel % p.out_width * s.s[3];
      }
      for (int64_t o0 = 0; o0 < p.out_channels; o0 += kSide)
        for (int64_t j = 0; j < count; ++j)
          for (int64_t o = o0, o1 = std::min(p.out_channels, o0 + kSide); o < o1; ++o)
            to[(o / n * tile + first + j) * n + o % n] = from[source[j] + o * s.s[1]];
    }
  });
  return to;
}

// Product rows [groups][tile][C_out/groups] plus bias to positions [begin, begin + tile) of the output.
template <typename T>
DCN_CLONES void write_output(const DeformConvParams& p, const T* rows, const T* bias, int64_t begin, int64_t tile, int64_t first, int64_t last,
                             bool channels_last, T* out) {
  const int64_t n = p.group_outputs();
  if (channels_last) {
    for (int64_t j = first; j < last; ++j)
      for (int64_t group = 0; group < p.groups; ++group) {
        const T* from = rows + (group * tile + j) * n;
        T* to = out + (begin + j) * p.out_channels + group * n;
        if (bias) for (int64_t i = 0; i < n; ++i) store_one(to + i, load_one(from + i) + load_one(bias + group * n + i));
        else for (int64_t i = 0; i < n; ++i) to[i] = from[i];
      }
    return;
  }
  constexpr int64_t kSide = 16;  // a cache line of float32
  for (int64_t j0 = first; j0 < last; j0 += kSide)
    for (int64_t o = 0; o < p.out_channels; ++o) {
      const T* from = rows + (o / n * tile) * n + o % n;
      for (int64_t j = j0, j1 = std::min(last, j0 + kSide); j < j1; ++j) {
        const int64_t position = begin + j;
        T* to = out + (position / p.out_pixels() * p.out_channels + o) * p.out_pixels() + position % p.out_pixels();
        store_one(to, bias ? load_one(from + j * n) + load_one(bias + o) : load_one(from + j * n));
      }
    }
}

}  // namespace dcnseg_ops
