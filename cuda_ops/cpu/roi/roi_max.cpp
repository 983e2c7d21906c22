// dcnseg::roi_pool: the maximum of every bin, and its derivative. See roi_items.h for the division of the work.
#include <limits>
#include "cpu/roi/roi_args.h"
#include "cpu/roi/roi_items.h"
#include "cpu/roi/roi_max_loops.h"
#include "cpu/roi/roi_pool.h"
namespace dcnseg_ops {
namespace {

template <typename T>
struct MaxOutput {
  T* values;
  int32_t* argmax;
  bool channels_last;
};

template <typename T>
struct MaxStage {  // [bins][channels] of one box, before they are written to a contiguous output
  Buffer<T> values;
  Buffer<int32_t> argmax;
};

// All bins of box r, channels [begin, end). Channel 0 of `in` is channel `begin`.
template <typename T>
void pool_box(const RoiShape& p, const BinSource& source, int64_t r, const Pixels<const T>& in, int64_t begin,
              int64_t end, const MaxOutput<T>& out, MaxStage<T>& stage) {
  const int64_t n = end - begin, bins = p.bins(), first = (r * p.channels + begin) * bins;
  const bool is_dense = in.channel == 1;
  T* values = out.values + first;
  int32_t* argmax = out.argmax + first;
  int64_t bin_step = 1, channel_step = bins;
  if (out.channels_last || is_dense) bin_step = n, channel_step = 1;
  if (out.channels_last) {
    values = out.values + r * bins * p.channels + begin;
    argmax = out.argmax + r * bins * p.channels + begin;
    bin_step = p.channels;
  } else if (is_dense) {
    values = stage.values.get(bins * n);
    argmax = stage.argmax.get(bins * n);
  }
  for (int64_t bin = 0; bin < bins; ++bin) {
    const PixelWindow w = pixel_window(source, r, bin);
    if (is_dense)
      max_dense(in, w, n, values + bin * bin_step, argmax + bin * bin_step);
    else
      max_strided(in, w, n, values + bin * bin_step, argmax + bin * bin_step, channel_step);
  }
  if (out.channels_last || !is_dense) return;
  transpose_block(values, n, out.values + first, bins, bins, n);
  transpose_block(argmax, n, out.argmax + first, bins, bins, n);
}

template <typename T>
void fill_bad(const RoiShape& p, int64_t r, const MaxOutput<T>& out) {
  const int64_t count = p.channels * p.bins();
  for (int64_t i = r * count; i < (r + 1) * count; ++i) {
    store_one(out.values + i, std::numeric_limits<AccOf<T>>::quiet_NaN());
    out.argmax[i] = -1;
  }
}

template <typename T>
MaxPooled forward(const Tensor& input, const Tensor& bins, const RoiShape& p, bool channels_last) {
  const BinSource source = bins_of(bins, p);
  MaxPooled pooled{empty_output(input, p, channels_last), empty_output(bins, p, channels_last)};
  const MaxOutput<T> out{pooled.output.out<T>(), pooled.argmax.out<int32_t>(), channels_last};
  const BoxesByImage by_image(source, p);
  const bool input_last = is_channels_last(input);
  const std::vector<Piece> pieces = list_pieces(p, source, by_image, reading_chunks(p, input_last, sizeof(T)), true);
  const T* data = input.in<T>();
  for_ranges(static_cast<int64_t>(pieces.size()), max_threads(p, pieces, sizeof(T)), [&](int64_t first, int64_t last) {
    Buffer<T> slab;
    MaxStage<T> stage;
    for (int64_t i = first; i < last; ++i) {
      const Piece& piece = pieces[i];
      const int64_t *box = by_image.boxes.data() + piece.first_box, *end = by_image.boxes.data() + piece.end_box;
      if (piece.image == p.batch) {
        for (; box != end; ++box) fill_bad(p, *box, out);
        continue;
      }
      const Pixels<const T> in = input_of(p, piece, data, input_last, slab);
      for (; box != end; ++box) pool_box(p, source, *box, in, piece.begin, piece.end, out, stage);
    }
  });
  return pooled;
}

// Adds `count` gradients at their maxima; pixel indices are relative to `first`.
template <typename T>
void scatter(const T* grad, int64_t grad_step, const int32_t* argmax, int64_t argmax_step, int64_t count, int64_t first,
             int64_t pixels, AccOf<T>* sums, int64_t sums_step, int64_t pixel_step) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = argmax[i * argmax_step] - first;
    if (static_cast<uint64_t>(at) < static_cast<uint64_t>(pixels))  // also false for negative values
      sums[i * sums_step + at * pixel_step] += load_one(grad + i * grad_step);
  }
}

// Adds the gradients of box r with maxima in rows [row, row_end), which are the rows of the sums.
template <typename T>
void scatter_box(const RoiShape& p, int64_t r, const Piece& piece, const GradView<T>& grad,
                 const GradView<int32_t>& argmax, const Pixels<AccOf<T>>& sums, int64_t row, int64_t row_end) {
  const int64_t n = piece.end - piece.begin, first = row * p.width, pixels = (row_end - row) * p.width;
  if (sums.channel == 1) {
    for (int64_t bin = 0; bin < p.bins(); ++bin)
      scatter(grad.at(r, piece.begin, bin), grad.s.s[1], argmax.at(r, piece.begin, bin), argmax.s.s[1], n, first,
              pixels, sums.data, 1, sums.pixel);
    return;
  }
  const bool is_run = grad.is_run() && argmax.is_run();  // otherwise one row of bins at a time
  const int64_t count = is_run ? p.bins() : p.kw, rows = is_run ? 1 : p.kh;
  for (int64_t c = 0; c < n; ++c)
    for (int64_t i = 0; i < rows; ++i) {
      const T* values = grad.at(r, piece.begin + c, i * p.kw);
      const int32_t* indices = argmax.at(r, piece.begin + c, i * p.kw);
      AccOf<T>* to = sums.data + c * sums.channel;
      if (is_run)
        scatter(values, 1, indices, 1, count, first, pixels, to, 0, 1);
      else
        scatter(values, grad.s.s[3], indices, argmax.s.s[3], count, first, pixels, to, 0, sums.pixel);
    }
}

template <typename T>
Tensor backward(const Tensor& grad, const Tensor& input, const Tensor& bins, const Tensor& argmax, const RoiShape& p) {
  const BinSource source = bins_of(bins, p);
  Tensor grad_input = empty_like(input);
  const BoxesByImage by_image(source, p);
  const bool input_last = is_channels_last(input);
  const std::vector<Piece> pieces =
      list_pieces(p, source, by_image, adding_chunks(p, input_last, sizeof(AccOf<T>)), false);
  const GradView<T> grads{grad.in<T>(), Strides4(grad), p.kh, p.kw};
  const GradView<int32_t> maxima{argmax.in<int32_t>(), Strides4(argmax), p.kh, p.kw};
  T* to = grad_input.out<T>();
  for_ranges(static_cast<int64_t>(pieces.size()), thread_count(), [&](int64_t first, int64_t last) {
    Buffer<AccOf<T>> buffer;
    Buffer<T> strip;
    for (int64_t i = first; i < last; ++i) {
      const Piece& piece = pieces[i];
      InputSums<T> input_sums(p, to, input_last, piece, false, buffer, strip);
      input_sums.for_bands([&](const Pixels<AccOf<T>>& sums, int64_t row, int64_t row_end) {
        for (int64_t k = piece.first_box; k < piece.end_box; ++k)
          scatter_box(p, by_image.boxes[k], piece, grads, maxima, sums, row, row_end);
      });
    }
  });
  return grad_input;
}

}  // namespace

MaxPooled roi_pool(const Tensor& input, const Tensor& bins, int64_t kh, int64_t kw, bool channels_last) {
  const RoiShape p = shape_of(input, bins, {kh, kw, 1, 1});
  return by_dtype(input, [&](auto zero) { return forward<decltype(zero)>(input, bins, p, channels_last); });
}

Tensor roi_pool_backward(const Tensor& grad, const Tensor& input, const Tensor& bins, const Tensor& argmax) {
  DCN_CHECK(grad.dim() == 4, "roi_pool_backward: `grad` must be [R, C, kh, kw]");
  const RoiShape p = shape_of(input, bins, {grad.sizes()[2], grad.sizes()[3], 1, 1});
  check_grad(grad, input, p);
  DCN_CHECK(argmax.dtype() == aoti_torch_dtype_int32() && argmax.dim() == 4 &&
                std::equal(grad.sizes(), grad.sizes() + 4, argmax.sizes()),
            "roi_pool_backward: `argmax` must be int32, of the size of `grad`");
  return by_dtype(input, [&](auto zero) { return backward<decltype(zero)>(grad, input, bins, argmax, p); });
}

}  // namespace dcnseg_ops
