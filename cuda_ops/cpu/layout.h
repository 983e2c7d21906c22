// Copies between torch's memory orders and the row-major matrices of the GEMMs, in parallel.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include "deform_conv_params.h"
#include "simd.h"
#include "torch_c_abi.h"
#include "transpose.h"
namespace dcnseg_ops {

template <typename T>
struct Buffer {  // uninitialised memory, aligned to cache lines
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory;
  T* get(int64_t count) {
    if (!memory) {
      const size_t bytes = (static_cast<size_t>(count) * sizeof(T) / 64 + 1) * 64;
      memory.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (!memory) throw std::bad_alloc();
    }
    return memory.get();
  }
};

struct Strides4 {
  int64_t s[4];
  explicit Strides4(const Tensor& t) {
    for (int i = 0; i < 4; ++i) s[i] = t.strides()[i];
  }
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
inline int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_item));
}

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

// out [count][columns][rows] = in [count][rows][columns].
template <typename T>
void transpose(const T* in, T* out, int64_t count, int64_t rows, int64_t columns) {
  constexpr int64_t kStrip = 32;
  const int64_t strips = (columns + kStrip - 1) / kStrip;
  parallel_for(0, count * strips, grain(rows * kStrip), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % strips * kStrip, matrix = item / strips * rows * columns;
      transpose_block(in + matrix + first, columns, out + matrix + first * rows, rows, rows,
                      std::min(kStrip, columns - first));
    }
  });
}

// Weight to [groups][K][C_out/groups].
template <typename T>
const T* transposed_weight(const DeformConvParams& p, const Tensor& weight, Buffer<T>& rows_buffer, Buffer<T>& buffer) {
  const T* rows = weight_rows(p, weight, rows_buffer);
  T* to = buffer.get(p.out_channels * p.depth());
  transpose(rows, to, p.groups, p.group_outputs(), p.depth());
  rows_buffer.memory.reset();
  return to;
}

// Input [B, C, H, W], contiguous or channels-last, to rows [B][H][W][C]; itself if it lies so.
template <typename T>
const T* pixel_rows(const DeformConvParams& p, const Tensor& input, Buffer<T>& buffer) {
  if (is_channels_last(input)) return input.in<T>();
  T* to = buffer.get(input.numel());
  transpose(input.in<T>(), to, p.batch, p.channels, p.height * p.width);
  return to;
}

// Positions [begin, end) cut where an image ends: f(first position, its image, its pixel, how many).
template <typename F>
void for_images(const DeformConvParams& p, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    const int64_t pixel = begin % p.out_pixels(), n = std::min(end - begin, p.out_pixels() - pixel);
    f(begin, begin / p.out_pixels(), pixel, n);
    begin += n;
  }
}

// Gradient rows [groups][tile][C_out/groups] of positions [begin, begin + tile) of grad
// [B, C_out, H_out, W_out], which may have any strides, 0 too.
template <typename T>
const T* gradient_rows(const DeformConvParams& p, const Tensor& grad, int64_t begin, int64_t tile, Buffer<T>& buffer,
                       int64_t capacity) {
  const T* from = grad.in<T>();
  if (p.groups == 1 && is_channels_last(grad)) return from + begin * p.out_channels;
  const Strides4 s(grad);
  const int64_t n = p.group_outputs();
  const bool is_plane = (s.s[3] == 1 || p.out_width == 1) && (s.s[2] == p.out_width || p.out_height == 1);
  T* to = buffer.get(capacity * p.out_channels);
  parallel_for(0, tile, grain(p.out_channels), [&](int64_t first, int64_t last) {
    for_images(p, begin + first, begin + last, [&](int64_t position, int64_t image, int64_t pixel, int64_t count) {
      for (int64_t group = 0; group < p.groups; ++group) {
        const T* planes = from + image * s.s[0] + group * n * s.s[1];
        T* rows = to + (group * tile + position - begin) * n;
        if (is_plane) {
          transpose_block(planes + pixel, s.s[1], rows, n, n, count);
          continue;
        }
        for (int64_t j = pixel; j < pixel + count; ++j, rows += n)
          for (int64_t o = 0; o < n; ++o)
            rows[o] = planes[o * s.s[1] + j / p.out_width * s.s[2] + j % p.out_width * s.s[3]];
      }
    });
  });
  return to;
}

template <typename T>
DCN_CLONES void add_bias(T* values, int64_t count, const T* bias, int64_t bias_step) {
  for (int64_t i = 0; i < count; ++i) store_one(values + i, load_one(values + i) + load_one(bias + i * bias_step));
}

// Product rows [groups][tile][C_out/groups] plus bias to positions [begin + first, begin + last) of
// the output; `begin` is where the tile begins.
template <typename T>
void write_output(const DeformConvParams& p, const T* rows, const T* bias, int64_t begin, int64_t tile, int64_t first,
                  int64_t last, bool channels_last, T* out) {
  const int64_t n = p.group_outputs();
  if (channels_last) {
    for (int64_t j = first; j < last; ++j)
      for (int64_t group = 0; group < p.groups; ++group) {
        T* to = out + (begin + j) * p.out_channels + group * n;
        std::copy_n(rows + (group * tile + j) * n, n, to);
        if (bias) add_bias(to, n, bias + group * n, 1);
      }
    return;
  }
  for_images(p, begin + first, begin + last, [&](int64_t position, int64_t image, int64_t pixel, int64_t count) {
    T* planes = out + image * p.out_channels * p.out_pixels() + pixel;
    for (int64_t group = 0; group < p.groups; ++group)
      transpose_block(rows + (group * tile + position - begin) * n, n, planes + group * n * p.out_pixels(),
                      p.out_pixels(), count, n);
    for (int64_t o = 0; bias && o < p.out_channels; ++o) add_bias(planes + o * p.out_pixels(), count, bias + o, 0);
  });
}

}  // namespace dcnseg_ops
