// The CPU operator: tiles of output positions, each sampled to columns, multiplied and forgotten.
//
// Memory beyond input and output: the columns of one tile and, in the backward, their gradients
// (kTileBytes each), and copies of the weight's size.
#include "deform_conv2d.h"
#include <algorithm>
#include "gemm.h"
#include "layout.h"
#include "sampling.h"
namespace dcnseg_ops {
namespace {

static const int64_t kTileBytes = int64_t((getenv("DCN_TILE") ? atof(getenv("DCN_TILE")) : 20) * (1 << 20));

// Equal tiles whose columns take at most kTileBytes, but not too few rows for an efficient GEMM.
int64_t tile_size(const DeformConvParams& p, int64_t element_bytes) {
  const int64_t most = std::max<int64_t>(64, kTileBytes / (p.channels * p.taps() * element_bytes));
  const int64_t tiles = std::max<int64_t>(1, (p.positions() + most - 1) / most);
  const int64_t even = (p.positions() + tiles - 1) / tiles;
  return (even + kBlock - 1) / kBlock * kBlock;
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
Sampler<T> sampler_of(const DeformConvArgs& a, const std::vector<T>& zeros) {
  return {a.params, a.input.in<T>(), zeros.data(), planes_of<AccOf<T>>(a.offset), planes_of<AccOf<T>>(a.mask), segments_of(a.params)};
}

// f(begin, end) for ranges of [0, count) that are multiples of kBlock long.
template <typename F>
void for_blocks(int64_t count, const F& f) {
  parallel_for(0, (count + kBlock - 1) / kBlock, 1, [&](int64_t b, int64_t e) { f(b * kBlock, std::min(count, e * kBlock)); });
}

template <typename T>
Tensor forward(const DeformConvArgs& a, const Tensor& bias, bool channels_last) {
  const DeformConvParams& p = a.params;
  const std::vector<int64_t> sizes = {p.batch, p.out_channels, p.out_height, p.out_width};
  Tensor output = channels_last ? empty_strided(sizes, channels_last_strides(sizes), a.input) : empty_contiguous(sizes, a.input);
  if (p.positions() == 0) return output;
  const std::vector<T> zeros(static_cast<size_t>(p.channels), T{});
  const Sampler<T> sampler = sampler_of<T>(a, zeros);
  const T* bias_data = bias.numel() ? bias.in<T>() : nullptr;
  T* out = output.out<T>();
  Buffer<T> weight_buffer, columns_buffer, product_buffer;
  const T* weight = weight_rows(p, a.weight, weight_buffer);
  const int64_t tile = tile_size(p, sizeof(T));
  T* columns = columns_buffer.get(tile * p.channels * p.taps());
  T* scratch = prefers_convolution<T>(tile, p.depth(), p.group_outputs(), p.groups) ? nullptr : product_buffer.get(tile * p.out_channels);
  for (int64_t begin = 0; begin < p.positions(); begin += tile) {
    const int64_t n = std::min(tile, p.positions() - begin);
    for_blocks(n, [&](int64_t b, int64_t e) { sample_columns(sampler, begin, n, begin + b, begin + e, columns); });
    if (!scratch && !prefers_convolution<T>(n, p.depth(), p.group_outputs(), p.groups)) scratch = product_buffer.get(tile * p.out_channels);
    const Product<T> product = multiply_rows(columns, weight, scratch, p.groups, n, p.depth(), p.group_outputs());
    for_blocks(n, [&](int64_t b, int64_t e) { write_output(p, product.data, bias_data, begin, n, b, e, channels_last, out); });
  }
  return output;
}

template <typename T>
struct Backward {
  using A = AccOf<T>;
  Backward(const DeformConvArgs& args, WantedGrads wanted_) : a(args), wanted(wanted_) {}
  const DeformConvArgs& a;
  const DeformConvParams& p = a.params;
  const WantedGrads wanted;
  const std::vector<T> zeros = std::vector<T>(static_cast<size_t>(p.channels), T{});
  const Sampler<T> sampler = sampler_of<T>(a, zeros);
  const int64_t tile = tile_size(p, sizeof(T));
  PositionGrads<T> positions;
  A* grad_input = nullptr;   // [B, H, W, C]
  A* grad_weight = nullptr;  // [C_out][T][C/groups]
  Buffer<T> rows_buffer, transposed_buffer, columns_buffer, weight_buffer, weight_transposed_buffer, product_buffer, weight_product_buffer;
  const T* weight_transposed = nullptr;  // [groups][K][C_out/groups]

  void prepare_weight() {
    const T* weight = weight_rows(p, a.weight, weight_buffer);
    T* to = weight_transposed_buffer.get(p.out_channels * p.depth());
    transpose(weight, to, p.groups, p.group_outputs(), p.depth());
    weight_buffer.memory.reset();
    weight_transposed = to;
  }

  void input_and_positions(const T* rows, int64_t begin, int64_t n) {
    const int64_t outputs = p.group_outputs(), depth = p.depth();
    T* scratch = prefers_convolution<T>(n, outputs, depth, p.groups) ? columns_buffer.get(tile * p.channels * p.taps())
                                                                      : product_buffer.get(tile * p.channels * p.taps());
    const Product<T> grads = multiply_rows(rows, weight_transposed, scratch, p.groups, n, outputs, depth);
    if (positions.offset || positions.mask)
      for_blocks(n, [&](int64_t b, int64_t e) { position_grads(sampler, begin, n, begin + b, begin + e, grads.data, positions); });
    if (grad_input) {
      constexpr int64_t kChannels = 16;  // a cache line of float32: threads do not share one
      parallel_for(0, (p.channels + kChannels - 1) / kChannels, 1, [&](int64_t b, int64_t e) {
        const int64_t first = b * kChannels, last = std::min(p.channels, e * kChannels);
        std::vector<A> waste(static_cast<size_t>(last - first));
        scatter_columns(sampler, begin, n, first, last, grads.data, grad_input, waste.data());
      });
    }
  }

  void weight_of_tile(const T* rows, int64_t begin, int64_t n) {
    const int64_t outputs = p.group_outputs(), depth = p.depth(), size = p.out_channels * depth;
    T* columns = columns_buffer.get(tile * p.channels * p.taps());
    for_blocks(n, [&](int64_t b, int64_t e) { sample_columns(sampler, begin, n, begin + b, begin + e, columns); });
    const bool convolution = prefers_convolution<T>(n, depth, outputs, p.groups);
    T* transposed = nullptr;
    if (convolution) {
      transposed = transposed_buffer.get(tile * p.out_channels);
      transpose(rows, transposed, 1, n, outputs);
    }
    T* scratch = weight_product_buffer.get(size);
    const Product<T> product = multiply_columns(rows, transposed, columns, scratch, p.groups, n, depth, outputs);
    parallel_for(0, size, 32768, [&](int64_t b, int64_t e) { accumulate(product.data, b, e, begin == 0); });
  }

  void accumulate(const T* from, int64_t begin, int64_t end, bool first) {
    if (first) for (int64_t i = begin; i < end; ++i) grad_weight[i] = load_one(from + i);
    else for (int64_t i = begin; i < end; ++i) grad_weight[i] += load_one(from + i);
  }

  void run(const Tensor& grad) {
    const bool columns_wanted = wanted.input || wanted.offset || wanted.mask;
    if (columns_wanted) prepare_weight();
    for (int64_t begin = 0; begin < p.positions(); begin += tile) {
      const int64_t n = std::min(tile, p.positions() - begin);
      const T* rows = gradient_rows(p, grad, begin, n, rows_buffer, tile);
      if (columns_wanted) input_and_positions(rows, begin, n);
      if (wanted.weight) weight_of_tile(rows, begin, n);
    }
  }
};

template <typename T>
void convert(const AccOf<T>* from, T* to, int64_t count) {
  parallel_for(0, count, 32768, [&](int64_t b, int64_t e) { for (int64_t i = b; i < e; ++i) store_one(to + i, from[i]); });
}

// Sums [C_out][T][C/groups] to a tensor laid out as the weight is: channels-last or contiguous.
template <typename T>
Tensor weight_gradient(const DeformConvArgs& a, const AccOf<T>* from) {
  const DeformConvParams& p = a.params;
  const std::vector<int64_t> sizes = {p.out_channels, p.group_channels(), p.kernel_h, p.kernel_w};
  const int64_t taps = p.taps(), channels = p.group_channels();
  if (is_channels_last(a.weight)) {
    Tensor grad = empty_strided(sizes, channels_last_strides(sizes), a.weight);
    convert<T>(from, grad.out<T>(), p.out_channels * p.depth());
    return grad;
  }
  Tensor grad = empty_contiguous(sizes, a.weight);
  T* to = grad.out<T>();
  parallel_for(0, p.out_channels, grain(p.depth()), [&](int64_t b, int64_t e) {
    for (int64_t o = b; o < e; ++o)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t t = 0; t < taps; ++t) store_one(to + (o * channels + c) * taps + t, from[(o * taps + t) * channels + c]);
  });
  return grad;
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
  const std::vector<int64_t> in_sizes = {p.batch, p.channels, p.height, p.width};
  const int64_t in_count = p.batch * p.channels * p.height * p.width;
  const auto planes = [&](bool is_wanted, int64_t channels) {
    return empty_contiguous(is_wanted ? std::vector<int64_t>{p.batch, channels, p.out_height, p.out_width} : std::vector<int64_t>{0}, a.offset);
  };
  DeformConvGrads grads = {
      wanted.input ? empty_strided(in_sizes, channels_last_strides(in_sizes), a.input) : empty_contiguous({0}, a.input),
      planes(wanted.offset, 2 * p.offset_groups * p.taps()), planes(wanted.mask, p.offset_groups * p.taps()), empty_contiguous({0}, a.weight)};
  Backward<T> work(a, wanted);
  Buffer<A> input_sums, weight_sums;
  if (wanted.input) {
    if constexpr (std::is_same_v<T, A>) work.grad_input = zeroed(grads.input.out<A>(), in_count);
    else work.grad_input = zeroed(input_sums.get(in_count), in_count);
  }
  if (wanted.offset) work.positions.offset = grads.offset.out<A>();
  if (wanted.mask) work.positions.mask = grads.mask.out<A>();
  if (wanted.weight) work.grad_weight = weight_sums.get(p.out_channels * p.depth());
  if (wanted.weight && p.positions() == 0) zeroed(work.grad_weight, p.out_channels * p.depth());
  if (p.positions() > 0) work.run(grad);
  if constexpr (!std::is_same_v<T, A>)
    if (wanted.input) convert<T>(work.grad_input, grads.input.out<T>(), in_count);
  if (wanted.weight) grads.weight = weight_gradient<T>(a, work.grad_weight);
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
