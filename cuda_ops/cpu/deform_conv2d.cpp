// The CPU operator: tiles of output positions, each sampled to columns, multiplied and forgotten.
//
// Either each thread works on tiles of its own ("slots"), and torch's GEMM inside of it on one
// thread; or, where so many tiles would take too much memory, all threads share each tile. The
// first needs few barriers: on a machine whose cores others use, too, each of them costs a
// scheduler's time slice (64 channels, 2 threads, 2 other processes: 30 ms instead of 330).
//
// Memory beyond input and output: the columns and output rows of one tile (twice kMostBytes at most)
// and, in the backward, their gradients, as much again; copies of the weight's size. An input that is
// not channels-last is copied once to be so, and its gradient is summed in float32 at least.
#include "deform_conv2d.h"
#include <algorithm>
#include <mutex>
#include <optional>
#include <string>
#include "gemm.h"
#include "layout.h"
#include "sampling.h"
namespace dcnseg_ops {
namespace {

constexpr int64_t kMostBytes = 20 << 20;  // of a tile's columns
constexpr int64_t kCacheBytes = 4 << 20;  // what stays near the cores
constexpr int64_t kGoodRows = 1024;       // fewer, and the GEMM's packing of the weight begins to show

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

struct Tiles {
  int64_t positions, size, count, slots;  // slots: threads with tiles of their own; 1: tiles are shared

  int64_t begin(int64_t tile) const { return tile * size; }
  int64_t rows(int64_t tile) const { return std::min(size, positions - begin(tile)); }
  int64_t first_of(int64_t slot) const { return slot * count / slots; }
};

// Equal tiles whose columns fit the cache, or have kGoodRows rows if that is more. `slot_bytes` is
// what a slot needs beside the columns.
Tiles tiles_of(const DeformConvParams& p, int64_t element_bytes, int64_t slot_bytes) {
  const int64_t row_bytes = (p.channels * p.taps() + p.out_channels) * element_bytes, threads = thread_count();
  const int64_t wanted = std::max<int64_t>(kGoodRows, kCacheBytes / row_bytes);
  const bool is_shared = p.positions() < kGoodRows || (wanted * row_bytes + slot_bytes) * threads > 2 * kMostBytes;
  const int64_t most = std::max<int64_t>(128, std::min(wanted, kMostBytes / row_bytes));
  const int64_t slots = is_shared ? 1 : threads;
  const int64_t count = round_up(std::max<int64_t>(1, (p.positions() + most - 1) / most), slots);
  const int64_t size = round_up(std::max<int64_t>(1, (p.positions() + count - 1) / count), kBlock);
  const int64_t filled = (p.positions() + size - 1) / size;
  return {p.positions(), size, filled, std::min(slots, std::max<int64_t>(1, filled))};
}

// f(i) for each i < count, each on a thread of its own if there are several.
template <typename F>
void for_slots(int64_t count, const F& f) {
  if (count == 1) return f(0);
  std::mutex mutex;
  std::string error;
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t i = begin; i < end; ++i) f(i);
    } catch (const std::exception& e) {  // may not leave a parallel region
      const std::lock_guard<std::mutex> lock(mutex);
      error = e.what();
    }
  });
  DCN_CHECK(error.empty(), error);
}

template <typename A>
Planes<A> planes_of(const Tensor& t) {
  if (t.numel() == 0) return {};
  const Strides4 s(t);
  return {t.in<A>(), s.s[0], s.s[1], s.s[2], s.s[3]};
}

std::vector<Segment> segments_of(const DeformConvParams& p) {
  std::vector<Segment> segments;
  for (int64_t begin = 0; begin < p.channels;) {
    const int64_t group = begin / p.group_channels(), offset_group = begin / p.offset_group_channels();
    const int64_t end = std::min((group + 1) * p.group_channels(), (offset_group + 1) * p.offset_group_channels());
    segments.push_back({begin, end, group, offset_group});
    begin = end;
  }
  return segments;
}

template <typename T>
Sampler<T> sampler_of(const DeformConvArgs& a, const std::vector<T>& zeros, Buffer<T>& input) {
  return {a.params,
          pixel_rows(a.params, a.input, input),
          zeros.data(),
          planes_of<AccOf<T>>(a.offset),
          planes_of<AccOf<T>>(a.mask),
          segments_of(a.params)};
}

// f(begin, end) for ranges of [0, count) that are multiples of kBlock long.
template <typename F>
void for_blocks(int64_t count, const F& f) {
  parallel_for(0, (count + kBlock - 1) / kBlock, 1,
               [&](int64_t b, int64_t e) { f(b * kBlock, std::min(count, e * kBlock)); });
}

template <typename T>
Tensor forward(const DeformConvArgs& a, const Tensor& bias, bool channels_last) {
  const DeformConvParams& p = a.params;
  const std::vector<int64_t> sizes = {p.batch, p.out_channels, p.out_height, p.out_width};
  Tensor output =
      channels_last ? empty_strided(sizes, channels_last_strides(sizes), a.input) : empty_contiguous(sizes, a.input);
  if (p.positions() == 0) return output;
  const std::vector<T> zeros(static_cast<size_t>(p.channels), T{});
  Buffer<T> input_buffer, weight_buffer;
  const Sampler<T> sampler = sampler_of<T>(a, zeros, input_buffer);
  const T* bias_data = bias.numel() ? bias.in<T>() : nullptr;
  T* out = output.out<T>();
  const T* weight = weight_rows(p, a.weight, weight_buffer);
  const Tiles tiles = tiles_of(p, sizeof(T), 0);
  for_slots(tiles.slots, [&](int64_t slot) {
    Buffer<T> columns_buffer, product_buffer;
    T* columns = columns_buffer.get(tiles.size * p.channels * p.taps());
    for (int64_t tile = tiles.first_of(slot); tile < tiles.first_of(slot + 1); ++tile) {
      const int64_t begin = tiles.begin(tile), n = tiles.rows(tile);
      for_blocks(n, [&](int64_t b, int64_t e) { sample_columns(sampler, begin, n, begin + b, begin + e, columns); });
      const Product<T> product = multiply_rows(columns, weight, product_buffer, tiles.size * p.out_channels, p.groups,
                                               n, p.depth(), p.group_outputs());
      for_blocks(n, [&](int64_t b, int64_t e) {
        write_output(p, product.data, bias_data, begin, n, b, e, channels_last, out);
      });
    }
  });
  return output;
}

// Gradients of input (sums [B, H, W, C]), offset and mask. The threads first make the gradients of
// the columns, each of its own tile, then split the channels to add them to the input's.
template <typename T>
void input_and_position_grads(const DeformConvArgs& a, const Sampler<T>& sampler, const Tensor& grad,
                              const PositionGrads<T>& positions, AccOf<T>* grad_input) {
  const DeformConvParams& p = a.params;
  Buffer<T> weight_buffer, transposed_buffer;
  const T* transposed = transposed_weight(p, a.weight, weight_buffer, transposed_buffer);
  const Tiles tiles = tiles_of(p, sizeof(T), 0);
  std::vector<Buffer<T>> rows_buffers(tiles.slots), product_buffers(tiles.slots);
  for (int64_t first = 0; first < tiles.count; first += tiles.slots) {
    const int64_t slots = std::min(tiles.slots, tiles.count - first);
    std::vector<std::optional<Product<T>>> products(slots);
    for_slots(slots, [&](int64_t slot) {
      const int64_t begin = tiles.begin(first + slot), n = tiles.rows(first + slot);
      const T* rows = gradient_rows(p, grad, begin, n, rows_buffers[slot], tiles.size);
      products[slot] = multiply_rows(rows, transposed, product_buffers[slot], tiles.size * p.channels * p.taps(),
                                     p.groups, n, p.group_outputs(), p.depth());
      const T* columns = products[slot]->data;
      if (positions.offset || positions.mask)
        for_blocks(n, [&](int64_t b, int64_t e) {
          position_grads(sampler, begin, n, begin + b, begin + e, columns, positions);
        });
    });
    if (!grad_input) continue;
    constexpr int64_t kChannels = 16;  // a cache line of float32: threads do not share one
    parallel_for(0, (p.channels + kChannels - 1) / kChannels, 1, [&](int64_t b, int64_t e) {
      const int64_t low = b * kChannels, high = std::min(p.channels, e * kChannels);
      std::vector<AccOf<T>> waste(static_cast<size_t>(high - low));
      for (int64_t slot = 0; slot < slots; ++slot)
        scatter_columns(sampler, tiles.begin(first + slot), tiles.rows(first + slot), low, high, products[slot]->data,
                        grad_input, waste.data());
    });
  }
}

// to += from, or to = from.
template <typename F, typename A>
void accumulate(const F* from, A* to, int64_t begin, int64_t end, bool is_first) {
  if (is_first)
    for (int64_t i = begin; i < end; ++i) to[i] = load_one(from + i);
  else
    for (int64_t i = begin; i < end; ++i) to[i] += load_one(from + i);
}

// Gradient of the weight: sums [C_out][T][C/groups].
template <typename T>
void weight_grads(const DeformConvArgs& a, const Sampler<T>& sampler, const Tensor& grad, AccOf<T>* sums) {
  using A = AccOf<T>;
  const DeformConvParams& p = a.params;
  const int64_t outputs = p.group_outputs(), depth = p.depth(), size = p.out_channels * depth;
  const Tiles tiles = tiles_of(p, sizeof(T), size * static_cast<int64_t>(sizeof(T) + sizeof(A)));
  std::vector<Buffer<A>> sums_buffers(tiles.slots);
  for_slots(tiles.slots, [&](int64_t slot) {
    Buffer<T> rows_buffer, transposed_buffer, columns_buffer, product_buffer;
    T* columns = columns_buffer.get(tiles.size * p.channels * p.taps());
    A* slot_sums = slot == 0 ? sums : sums_buffers[slot].get(size);
    for (int64_t tile = tiles.first_of(slot); tile < tiles.first_of(slot + 1); ++tile) {
      const int64_t begin = tiles.begin(tile), n = tiles.rows(tile);
      const T* rows = gradient_rows(p, grad, begin, n, rows_buffer, tiles.size);
      for_blocks(n, [&](int64_t b, int64_t e) { sample_columns(sampler, begin, n, begin + b, begin + e, columns); });
      T* transposed = nullptr;
      if (prefers_convolution<T>(n, depth, outputs, p.groups)) {
        transposed = transposed_buffer.get(tiles.size * p.out_channels);
        transpose(rows, transposed, 1, n, outputs);
      }
      const Product<T> product =
          multiply_columns(rows, transposed, columns, product_buffer, size, p.groups, n, depth, outputs);
      const bool is_first = tile == tiles.first_of(slot);
      parallel_for(0, size, 32768, [&](int64_t b, int64_t e) { accumulate(product.data, slot_sums, b, e, is_first); });
    }
  });
  for (int64_t slot = 1; slot < tiles.slots; ++slot)
    parallel_for(0, size, 32768,
                 [&](int64_t b, int64_t e) { accumulate(sums_buffers[slot].get(size), sums, b, e, false); });
}

template <typename T>
void convert(const AccOf<T>* from, T* to, int64_t count) {
  parallel_for(0, count, 32768, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) store_one(to + i, from[i]);
  });
}

// Sums [C_out][T][C/groups] to a tensor laid out as the weight is: channels-last or contiguous.
template <typename T>
Tensor weight_gradient(const DeformConvArgs& a, const AccOf<T>* from) {
  const DeformConvParams& p = a.params;
  Tensor grad = empty_like(a.weight);
  T* to = grad.out<T>();
  if (is_channels_last(a.weight)) {
    convert<T>(from, to, p.out_channels * p.depth());
    return grad;
  }
  const int64_t taps = p.taps(), channels = p.group_channels();
  parallel_for(0, p.out_channels, grain(p.depth()), [&](int64_t b, int64_t e) {
    for (int64_t o = b; o < e; ++o)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t t = 0; t < taps; ++t)
          store_one(to + (o * channels + c) * taps + t, from[(o * taps + t) * channels + c]);
  });
  return grad;
}

// Sums [B, H, W, C] to `grad`, laid out as the input is. They may be the memory of `grad` itself.
template <typename T>
void input_gradient(const DeformConvParams& p, AccOf<T>* from, const Tensor& grad) {
  const int64_t pixels = p.height * p.width, count = p.batch * p.channels * pixels;
  T* to = grad.out<T>();
  if (is_channels_last(grad)) {
    if constexpr (!std::is_same_v<T, AccOf<T>>) convert<T>(from, to, count);
    return;
  }
  Buffer<T> rounded;
  const T* rows;
  if constexpr (std::is_same_v<T, AccOf<T>>)
    rows = from;
  else
    convert<T>(from, rounded.get(count), count), rows = rounded.get(count);
  transpose(rows, to, p.batch, pixels, p.channels);
}

template <typename A>
A* zeroed(A* data, int64_t count) {
  parallel_for(0, count, 65536, [&](int64_t b, int64_t e) { std::fill(data + b, data + e, A(0)); });
  return data;
}

template <typename T>
DeformConvGrads backward(const Tensor& grad, const DeformConvArgs& a, WantedGrads wanted) {
  using A = AccOf<T>;
  const DeformConvParams& p = a.params;
  const int64_t in_count = p.batch * p.channels * p.height * p.width;
  const auto planes = [&](bool is_wanted, int64_t channels) {
    return empty_contiguous(
        is_wanted ? std::vector<int64_t>{p.batch, channels, p.out_height, p.out_width} : std::vector<int64_t>{0},
        a.offset);
  };
  DeformConvGrads grads = {wanted.input ? empty_like(a.input) : empty_contiguous({0}, a.input),
                           planes(wanted.offset, 2 * p.offset_groups * p.taps()),
                           planes(wanted.mask, p.offset_groups * p.taps()), empty_contiguous({0}, a.weight)};
  Buffer<A> input_sums, weight_sums;
  PositionGrads<T> positions;
  A *grad_input = nullptr, *grad_weight = nullptr;
  if (wanted.input) {
    const bool is_direct = std::is_same_v<T, A> && is_channels_last(grads.input);
    grad_input = zeroed(is_direct ? grads.input.out<A>() : input_sums.get(in_count), in_count);
  }
  if (wanted.offset) positions.offset = grads.offset.out<A>();
  if (wanted.mask) positions.mask = grads.mask.out<A>();
  if (wanted.weight) grad_weight = weight_sums.get(p.out_channels * p.depth());
  if (p.positions() == 0) {
    if (wanted.weight) zeroed(grad_weight, p.out_channels * p.depth());
  } else {
    const std::vector<T> zeros(static_cast<size_t>(p.channels), T{});
    Buffer<T> input_buffer;
    const Sampler<T> sampler = sampler_of<T>(a, zeros, input_buffer);
    if (wanted.input || wanted.offset || wanted.mask) input_and_position_grads(a, sampler, grad, positions, grad_input);
    if (wanted.weight) weight_grads(a, sampler, grad, grad_weight);
  }
  if (wanted.input) input_gradient<T>(p, grad_input, grads.input);
  if (wanted.weight) grads.weight = weight_gradient<T>(a, grad_weight);
  return grads;
}

template <typename F>
auto by_dtype(const Tensor& input, const F& f) {
  const int32_t dtype = input.dtype();
  if (dtype == aoti_torch_dtype_float32()) return f(float{});
  if (dtype == aoti_torch_dtype_float64()) return f(double{});
  if (dtype == aoti_torch_dtype_bfloat16()) return f(bf16{});
  throw std::runtime_error("deform_conv2d: expected float32, float64 or bfloat16 on the CPU");
}

}  // namespace

Tensor deform_conv2d(const DeformConvArgs& args, const Tensor& bias, bool channels_last) {
  return by_dtype(args.input, [&](auto zero) { return forward<decltype(zero)>(args, bias, channels_last); });
}

DeformConvGrads deform_conv2d_backward(const Tensor& grad, const DeformConvArgs& args, WantedGrads wanted) {
  return by_dtype(args.input, [&](auto zero) { return backward<decltype(zero)>(grad, args, wanted); });
}

}  // namespace dcnseg_ops
