// The backward of the convolution, tile by tile of positions over all images: the column gradients by a cuBLAS GEMM;
// from these the gradients of offset, mask and input, and the columns, which replace them; and a second GEMM that adds
// to the gradient of the weight. Only the gradients that are needed are computed.
#include "cuda/conv/column_grads.cuh"
#include "cuda/conv/conv_tile.cuh"
namespace dcnseg_ops {
namespace {

template <typename T, typename A>
class Backward {
 public:
  Backward(const ConvCall& call, const Tensor& grad, const ConvGrads& grads)
      : call_(call),
        p_(call.p),
        grads_(grads),
        cut_(cut_of(p_, buffer_bytes(grad), cache_bytes(call.input))),
        input_(call.input, input_pixels(p_, cut_.images), call.stream),
        grad_(grad, cut_.positions, call.stream),
        weight_(call.weight, weight_range().count, call.stream),
        grad_input_(grads.input, input_pixels(p_, cut_.images), call.stream),
        grad_weight_(grads.weight, weight_range().count, call.stream),
        columns_(empty_buffer(cut_.positions * p_.channels * p_.taps(), call.input.dtype(), call.input)) {}

  void run() const {
    const T* weight = weight_.rows(weight_range());
    A* weight_sums = grad_weight_.wanted() ? grad_weight_.zeroed_rows(weight_range()) : nullptr;
    for_images(p_, cut_, [&](int64_t first, int64_t images) {
      const Range pixels{input_pixels(p_, first), input_pixels(p_, images)};
      const T* input = input_.rows(pixels);
      A* input_sums = grad_input_.wanted() ? grad_input_.zeroed_rows(pixels) : nullptr;
      const int64_t planes = first * p_.offset_groups * p_.taps() * p_.out_pixels();
      const auto wanted = [](const Tensor& t, int64_t skipped) {
        return t.numel() ? t.template out<A>() + skipped : nullptr;
      };
      const ColumnGrads<A> grads{wanted(grads_.offset, 2 * planes), wanted(grads_.mask, planes), input_sums};
      for_tiles(p_, cut_, images, [&](int64_t begin, int64_t count) {
        const T* grad = grad_.rows({first * p_.out_pixels() + begin, count});
        run_tile(input, positions_from<A>(call_, first), {begin, count}, grad, weight, grads, weight_sums);
      });
      if (grad_input_.wanted()) grad_input_.finish(pixels);
    });
    if (grad_weight_.wanted()) grad_weight_.finish(weight_range());
  }

 private:
  void run_tile(const T* input, Positions<A> positions, Range range, const T* grad, const T* weight,
                const ColumnGrads<A>& grads, A* weight_sums) const {
    T* columns = columns_.template out<T>();
    if (grads.offset || grads.mask || grads.input) {
      multiply<T, T>(p_.groups, range.count, p_.depth(), p_.group_outputs(), outputs_of(p_, grad),
                     weights_of(p_, weight), columns_of(p_, columns, range.count), false, call_.allow_tf32);
      launch_column_grads(input, positions, range, weight_sums != nullptr, columns, grads);
    } else {
      sample_tile(call_, input, positions, range, columns);
    }
    if (weight_sums)
      multiply<T, A>(p_.groups, p_.group_outputs(), p_.depth(), range.count, transpose_of(outputs_of(p_, grad)),
                     columns_of<const T>(p_, columns, range.count), weights_of(p_, weight_sums), true,
                     call_.allow_tf32);
  }

  void launch_column_grads(const T* input, Positions<A> positions, Range range, bool columns_wanted, T* columns,
                           const ColumnGrads<A>& grads) const {
    by_vector(p_, input, true, [&](auto numbers) {
      constexpr int kNumbers = decltype(numbers)::value;
      DCN_LAUNCH((column_grads<T, A, kNumbers>), blocks_of_spots(p_, range), dim3(kThreads), 0, call_.stream, p_, input,
                 positions, range, lanes_for(p_, kNumbers), columns_wanted, columns, grads);
      check_cuda(cudaGetLastError(), "column_grads");
    });
  }

  Range weight_range() const { return {0, p_.out_channels * p_.taps()}; }
  BufferBytes buffer_bytes(const Tensor& grad) const {
    return {input_pixels(p_, 1) * (RowsFrom<T>::row_bytes(call_.input) + RowsInto<T, A>::row_bytes(grads_.input)),
            p_.channels * p_.taps() * static_cast<int64_t>(sizeof(T)) + RowsFrom<T>::row_bytes(grad),
            weight_range().count * (RowsFrom<T>::row_bytes(call_.weight) + RowsInto<T, A>::row_bytes(grads_.weight))};
  }

  const ConvCall& call_;
  const DeformConvParams& p_;
  const ConvGrads& grads_;
  Cut cut_;
  RowsFrom<T> input_, grad_, weight_;
  RowsInto<T, A> grad_input_, grad_weight_;
  Tensor columns_;
};

}  // namespace

void deform_conv2d_backward(const ConvCall& call, const Tensor& grad, const ConvGrads& grads) {
  by_dtype(call.input,
           [&](auto value, auto sum) { Backward<decltype(value), decltype(sum)>(call, grad, grads).run(); });
}

}  // namespace dcnseg_ops
