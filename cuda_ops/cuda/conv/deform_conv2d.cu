// The forward of the convolution: the fused kernel if it supports the call; otherwise, tile by tile of positions over
// all images, columns and one cuBLAS GEMM that adds to the bias.
#include "cuda/conv/conv_tile.cuh"
#include "cuda/conv/fused_forward.h"
namespace dcnseg_ops {
namespace {

template <typename T, typename A>
class Forward {
 public:
  Forward(const ConvCall& call, const Tensor& bias, const Tensor& output)
      : call_(call),
        p_(call.p),
        bias_(bias),
        output_(output),
        weight_(call.weight, p_.out_channels * p_.taps(), call.stream) {}

  void run_fused(bool channels_last) const {
    const Cut cut = cut_of(p_, {image_bytes(), 1, 0}, 0);
    const RowsFrom<T> input(call_.input, input_pixels(p_, cut.images), call_.stream);
    const Tensor weight = view_of(weight_rows(), call_.weight.numel(), call_.weight.dtype(), call_.input);
    const int64_t in_image = p_.channels * p_.height * p_.width, out_image = p_.out_channels * p_.out_pixels();
    const auto view = [](const auto* data, int64_t numel, const Tensor& like) {
      return view_of(data, numel, like.dtype(), like);
    };
    for_images(p_, cut, [&](int64_t first, int64_t images) {
      DeformConvParams part = p_;
      part.batch = images;
      const Positions<A> positions = positions_from<A>(call_, first);
      const int64_t planes = images * p_.offset_groups * p_.taps() * p_.out_pixels();
      const Tensor rows = view(input.rows({input_pixels(p_, first), input_pixels(p_, images)}), images * in_image,
                               call_.input),
                   offset = view(positions.offset, 2 * planes, call_.offset),
                   mask = positions.mask ? view(positions.mask, planes, call_.mask) : call_.mask,
                   output = view(output_.template out<T>() + first * out_image, images * out_image, output_);
      fused_forward(part, rows, offset, mask, weight, bias_, output, channels_last, call_.stream);
    });
  }

  void run_tiles() const {
    const BufferBytes bytes{
        image_bytes(), p_.channels * p_.taps() * static_cast<int64_t>(sizeof(T)) + RowsInto<T, T>::row_bytes(output_),
        p_.out_channels * p_.taps() * RowsFrom<T>::row_bytes(call_.weight)};
    const Cut cut = cut_of(p_, bytes, cache_bytes(call_.input));
    const RowsFrom<T> input(call_.input, input_pixels(p_, cut.images), call_.stream);
    const RowsInto<T, T> output(output_, cut.positions, call_.stream);
    const Tensor buffer = empty_buffer(cut.positions * p_.channels * p_.taps(), output_.dtype(), output_);
    T* columns = buffer.template out<T>();
    const T* weight = weight_rows();
    for_images(p_, cut, [&](int64_t first, int64_t images) {
      const T* in = input.rows({input_pixels(p_, first), input_pixels(p_, images)});
      const Positions<A> positions = positions_from<A>(call_, first);
      for_tiles(p_, cut, images, [&](int64_t begin, int64_t count) {
        sample_tile(call_, in, positions, {begin, count}, columns);
        const Range range{first * p_.out_pixels() + begin, count};
        T* out = output.rows(range);
        fill_with_bias(out, count);
        multiply<T, T>(p_.groups, count, p_.group_outputs(), p_.depth(), columns_of<const T>(p_, columns, count),
                       transpose_of(weights_of(p_, weight)), outputs_of(p_, out), bias_.numel() > 0, call_.allow_tf32);
        output.finish(range);
      });
    });
  }

 private:
  int64_t image_bytes() const { return input_pixels(p_, 1) * RowsFrom<T>::row_bytes(call_.input); }
  const T* weight_rows() const { return weight_.rows({0, p_.out_channels * p_.taps()}); }
  void fill_with_bias(T* rows, int64_t count) const {
    if (bias_.numel() == 0) return;
    const Range range{0, count};
    DCN_RUN_TILES((fill_rows<T>), range, p_.out_channels, call_.stream, bias_.template in<T>(), p_.out_channels, count,
                  rows);
  }

  const ConvCall& call_;
  const DeformConvParams& p_;
  const Tensor &bias_, &output_;
  RowsFrom<T> weight_;
};

}  // namespace

Tensor deform_conv2d(const ConvCall& call, const Tensor& bias, bool channels_last, bool fused) {
  const DeformConvParams& p = call.p;
  const std::vector<int64_t> sizes{p.batch, p.out_channels, p.out_height, p.out_width};
  const Tensor output = empty_dense(sizes, dense_strides(sizes.data(), channels_last), call.input.dtype(), call.input);
  if (output.numel() == 0) return output;
  by_dtype(call.input, [&](auto value, auto sum) {
    using T = decltype(value);
    const Forward<T, decltype(sum)> forward(call, bias, output);
    const bool aligned = reinterpret_cast<uintptr_t>(call.weight.in<T>()) % 16 == 0;  // it may be read in place
    if (fused && aligned && fused_forward_serves(p, call.input, call.allow_tf32))
      forward.run_fused(channels_last);
    else
      forward.run_tiles();
  });
  return output;
}

}  // namespace dcnseg_ops
