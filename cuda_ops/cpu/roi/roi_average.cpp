// dcnseg::roi_avg_pool and dcnseg::deform_roi_pool: weighted means of pixels, which differ only in their windows. See
// roi_items.h for the division of the work.
#include <algorithm>
#include <atomic>
#include <limits>
#include "cpu/roi/roi_args.h"
#include "cpu/roi/roi_average_loops.h"
#include "cpu/roi/roi_items.h"
#include "cpu/roi/roi_pool.h"
namespace dcnseg_ops {
namespace {

template <typename T>
struct Scratches {  // per thread
  Buffer<T> slab, stage, strip;
  Buffer<AccOf<T>> sums;
  BoxPlan<AccOf<T>> plan;
  std::vector<Tap<AccOf<T>>> rows;
};

// The plans of all boxes, if several work items need them and they are small; otherwise they are computed again.
template <typename A, typename Source>
class Plans {
 public:
  Plans(const Source& source, const RoiShape& p, int64_t uses) : source_(source) {
    if (uses <= 1) return;
    plans_.resize(static_cast<size_t>(std::min(kMaxPlans, p.rois * source.classes())));
    std::atomic<int64_t> bytes{0};
    for_ranges(static_cast<int64_t>(plans_.size()), thread_count(), [&](int64_t begin, int64_t end) {
      BoxPlan<A> plan;
      for (int64_t i = begin; i < end; ++i) {
        source.plan(i / source.classes(), i % source.classes(), plan);
        if ((bytes += plan.bytes()) < kMaxPlanBytes) plans_[i] = plan;
      }
    });
  }

  const BoxPlan<A>& of(int64_t r, int64_t kind, BoxPlan<A>& scratch) const {
    const size_t i = static_cast<size_t>(r * source_.classes() + kind);
    if (i < plans_.size() && plans_[i].bytes() > 0) return plans_[i];
    source_.plan(r, kind, scratch);
    return scratch;
  }

 private:
  static constexpr int64_t kMaxPlans = 1 << 15, kMaxPlanBytes = 8 << 20;
  const Source& source_;
  std::vector<BoxPlan<A>> plans_;
};

// f(class, begin, end) for the classes of channels [begin, end).
template <typename F>
void for_classes(int64_t class_channels, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    const int64_t kind = begin / class_channels, stop = std::min(end, (kind + 1) * class_channels);
    f(kind, begin, stop);
    begin = stop;
  }
}

template <typename Source>
int64_t class_channels(const RoiShape& p, const Source& source) {
  return p.outputs() / source.classes();
}

template <typename T>
struct Output {
  T* data;
  bool channels_last;
};

// All bins of box r for the channels of a work item.
template <typename T, typename Source>
void pool_box(const RoiShape& p, const Source& source, const Plans<AccOf<T>, Source>& plans, int64_t r,
              const Piece& piece, const Pixels<const T>& in, const Output<T>& out, Scratches<T>& scratch) {
  const int64_t n = piece.end - piece.begin, bins = p.bins();
  const bool is_dense = in.channel == 1 && p.cells() == 1;
  T* contiguous = out.data + (r * p.outputs() + piece.begin) * bins;
  T* to = contiguous;
  int64_t bin_step = 1, channel_step = bins;
  if (out.channels_last)
    to = out.data + r * bins * p.outputs() + piece.begin, bin_step = p.outputs(), channel_step = 1;
  else if (is_dense)
    to = scratch.stage.get(bins * n), bin_step = n, channel_step = 1;
  for_classes(class_channels(p, source), piece.begin, piece.end, [&](int64_t kind, int64_t begin, int64_t end) {
    const BoxPlan<AccOf<T>>& plan = plans.of(r, kind, scratch.plan);
    const int64_t first = begin - piece.begin;
    for (int64_t bin = 0; bin < bins; ++bin) {
      const Window<AccOf<T>> w = plan.window(bin);
      T* place = to + bin * bin_step + first * channel_step;
      Pixels<const T> own = in;
      own.data += (first * p.cells() + p.cell_of(bin)) * in.channel;
      own.channel *= p.cells();
      if (is_dense)
        mean(own, w, end - begin, place);
      else
        mean_strided(own, w, end - begin, place, channel_step);
    }
  });
  if (is_dense && !out.channels_last) transpose_block(to, n, contiguous, bins, bins, n);
}

template <typename T, typename Source>
Tensor forward(const Tensor& input, const Source& source, const RoiShape& p, bool channels_last) {
  Tensor output = empty_output(input, p, channels_last);
  const Output<T> out{output.out<T>(), channels_last};
  const BoxesByImage by_image(source, p);
  const bool input_last = is_channels_last(input);
  const Chunks chunks = reading_chunks(p, input_last, sizeof(T));
  const std::vector<Piece> pieces = list_pieces(p, source, by_image, chunks, true);
  const Plans<AccOf<T>, Source> plans(source, p, chunks.count(p));
  const T* data = input.in<T>();
  for_ranges(static_cast<int64_t>(pieces.size()), max_threads(p, pieces, sizeof(T)), [&](int64_t first, int64_t last) {
    Scratches<T> scratch;
    for (int64_t i = first; i < last; ++i) {
      const Piece& piece = pieces[i];
      Pixels<const T> in{data, 0, 0, 0};  // for invalid boxes, which read nothing
      if (piece.image < p.batch) in = input_of(p, piece, data, input_last, scratch.slab);
      for (int64_t k = piece.first_box; k < piece.end_box; ++k)
        pool_box(p, source, plans, by_image.boxes[k], piece, in, out, scratch);
    }
  });
  return output;
}

// Sums over the channels of a chunk, by class: [R][x, y][parts] each. A chunk may contain the end of one class and the
// start of the next; with the index chunk + class all of them are consecutive.
template <typename A>
struct ShiftSums {
  std::vector<A> data;
  int64_t size = 0, parts = 0, chunk = 1;  // chunk: number of channels

  A* at(int64_t first_channel, int64_t kind, int64_t r, int64_t part) {
    return data.data() + (first_channel / chunk + kind) * size + r * 2 * parts + part;
  }
};

// Inputs of a backward in addition to the map.
template <typename T, typename Source>
struct Backward {
  const RoiShape& p;
  const Source& source;
  const Plans<AccOf<T>, Source>& plans;
  const BoxesByImage& by_image;
  GradView<T> grad;
};

// The gradients of box r, channels [begin, end), as [bins][channels], with their strides.
template <typename T>
struct BoxGrads {
  const T* data;
  int64_t channel_step;
  const GradView<T>* view;  // null: staged

  const T* at(int64_t bin, int64_t n) const { return view ? data + view->bin_offset(bin) : data + bin * n; }
};

template <typename T>
BoxGrads<T> grads_of(const GradView<T>& grad, int64_t r, const Piece& piece, bool is_dense, Buffer<T>& stage) {
  const int64_t n = piece.end - piece.begin;
  if (!is_dense || grad.s.s[1] == 1) return {grad.at(r, piece.begin, 0), grad.s.s[1], &grad};
  T* to = stage.get(n * grad.kh * grad.kw);
  grad.copy(r, piece.begin, n, to);
  return {to, 1, nullptr};
}

// Adds the gradients of a work item to rows [row, row_end) of the sums.
template <typename T, typename Source>
void spread_piece(const Backward<T, Source>& b, const Piece& piece, const Pixels<AccOf<T>>& sums, int64_t row,
                  int64_t row_end, Scratches<T>& scratch) {
  const RoiShape& p = b.p;
  const bool is_dense = sums.channel == 1 && p.cells() == 1;
  for (int64_t k = piece.first_box; k < piece.end_box; ++k) {
    const int64_t r = b.by_image.boxes[k];
    const BoxGrads<T> grads = grads_of(b.grad, r, piece, is_dense, scratch.stage);
    for_classes(class_channels(p, b.source), piece.begin, piece.end, [&](int64_t kind, int64_t begin, int64_t end) {
      const BoxPlan<AccOf<T>>& plan = b.plans.of(r, kind, scratch.plan);
      const int64_t first = begin - piece.begin;
      for (int64_t bin = 0; bin < p.bins(); ++bin) {
        Window<AccOf<T>> w = plan.window(bin);
        if (row > 0 || row_end < p.height) w = clip_rows(w, row, row_end, scratch.rows);
        if (w.is_empty()) continue;
        const T* grad = grads.at(bin, piece.end - piece.begin) + first * grads.channel_step;
        Pixels<AccOf<T>> own = sums;
        own.data += (first * p.cells() + p.cell_of(bin)) * sums.channel;
        own.channel *= p.cells();
        if (is_dense)
          spread(own, w, end - begin, grad);
        else
          spread_strided<T>(own, w, end - begin, grad, grads.channel_step);
      }
    });
  }
}

// The derivatives of a work item with respect to the shifts of its boxes.
template <typename T>
void shift_piece(const Backward<T, SampleSource<AccOf<T>>>& b, const Piece& piece, const Pixels<const T>& in,
                 ShiftSums<AccOf<T>>& sums, Scratches<T>& scratch) {
  const RoiShape& p = b.p;
  const bool is_dense = in.channel == 1 && p.cells() == 1;
  for (int64_t k = piece.first_box; k < piece.end_box; ++k) {
    const int64_t r = b.by_image.boxes[k];
    const BoxGrads<T> grads = grads_of(b.grad, r, piece, is_dense, scratch.stage);
    for_classes(class_channels(p, b.source), piece.begin, piece.end, [&](int64_t kind, int64_t begin, int64_t end) {
      const BoxPlan<AccOf<T>>& plan = b.plans.of(r, kind, scratch.plan);
      const int64_t first = begin - piece.begin;
      for (int64_t bin = 0; bin < p.bins(); ++bin) {
        const Window<AccOf<T>> w = plan.window(bin);
        const T* grad = grads.at(bin, piece.end - piece.begin) + first * grads.channel_step;
        Pixels<const T> own = in;
        own.data += (first * p.cells() + p.cell_of(bin)) * in.channel;
        own.channel *= p.cells();
        const ShiftGrad<AccOf<T>> sum = is_dense ? slopes(own, w, end - begin, grad)
                                                 : slopes_strided(own, w, end - begin, grad, grads.channel_step);
        AccOf<T>* to = sums.at(piece.begin, kind, r, b.source.part_of(bin));
        to[0] += sum.x;
        to[sums.parts] += sum.y;
      }
    });
  }
}

template <typename T, typename Source>
void input_gradient(const Backward<T, Source>& b, const Chunks& chunks, const Tensor& grad_input) {
  const RoiShape& p = b.p;
  const bool channels_last = is_channels_last(grad_input);
  const std::vector<Piece> pieces = list_pieces(p, b.source, b.by_image, chunks, false);
  T* to = grad_input.out<T>();
  for_ranges(static_cast<int64_t>(pieces.size()), thread_count(), [&](int64_t first, int64_t last) {
    Scratches<T> scratch;
    for (int64_t i = first; i < last; ++i) {
      InputSums<T> input_sums(p, to, channels_last, pieces[i], pieces[i].uses_slab, scratch.sums, scratch.strip);
      input_sums.for_bands([&](const Pixels<AccOf<T>>& sums, int64_t row, int64_t row_end) {
        spread_piece(b, pieces[i], sums, row, row_end, scratch);
      });
    }
  });
}

// Adds the sums over the chunks of every class in order. Invalid boxes give NaN.
template <typename A>
void add_chunks(const RoiShape& p, const SampleSource<A>& source, ShiftSums<A>& sums, A* grad_shift) {
  const int64_t classes = source.classes(), parts = sums.parts, per_class = class_channels(p, source);
  parallel_for(0, p.rois, grain(classes * parts), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t kind = 0; kind < classes; ++kind) {
        A* to = grad_shift + (r * classes + kind) * 2 * parts;
        std::fill_n(to, 2 * parts, source.image(r) < 0 ? std::numeric_limits<A>::quiet_NaN() : A(0));
        const int64_t first = kind * per_class / sums.chunk * sums.chunk, last = (kind + 1) * per_class;
        for (int64_t c = first; c < last; c += sums.chunk)
          for (int64_t i = 0; i < 2 * parts; ++i) to[i] += sums.at(c, kind, r, 0)[i];
      }
  });
}

template <typename T>
void shift_gradient(const Backward<T, SampleSource<AccOf<T>>>& b, const Chunks& chunks, const Tensor& input,
                    AccOf<T>* grad_shift) {
  const RoiShape& p = b.p;
  const bool channels_last = is_channels_last(input);
  const std::vector<Piece> pieces = list_pieces(p, b.source, b.by_image, chunks, true);
  ShiftSums<AccOf<T>> sums;
  sums.parts = b.source.part_h * b.source.part_w;
  sums.size = p.rois * 2 * sums.parts;
  sums.chunk = chunks.channels;
  sums.data.resize(static_cast<size_t>(sums.size * (chunks.count(p) + b.source.classes())));
  const T* data = input.in<T>();
  for_ranges(static_cast<int64_t>(pieces.size()), max_threads(p, pieces, sizeof(T)), [&](int64_t first, int64_t last) {
    Scratches<T> scratch;
    for (int64_t i = first; i < last; ++i)
      if (pieces[i].image < p.batch)
        shift_piece(b, pieces[i], input_of(p, pieces[i], data, channels_last, scratch.slab), sums, scratch);
  });
  add_chunks(p, b.source, sums, grad_shift);
}

template <typename T>
Tensor avg_backward(const Tensor& grad, const Tensor& input, const Tensor& bins, const RoiShape& p) {
  const BinSource source = bins_of(bins, p);
  Tensor grad_input = empty_like(input);
  const BoxesByImage by_image(source, p);
  const Chunks chunks = adding_chunks(p, is_channels_last(input), sizeof(AccOf<T>));
  const Plans<AccOf<T>, BinSource> plans(source, p, chunks.count(p));
  input_gradient(Backward<T, BinSource>{p, source, plans, by_image, {grad.in<T>(), Strides4(grad), p.kh, p.kw}}, chunks,
                 grad_input);
  return grad_input;
}

template <typename T>
DeformRoiGrads deform_backward(const Tensor& grad, const DeformRoiArgs& a, const RoiShape& p, bool input_wanted,
                               bool shift_wanted) {
  using Source = SampleSource<AccOf<T>>;
  const Source source = samples_of<AccOf<T>>(a, p);
  DeformRoiGrads grads{input_wanted ? empty_like(a.input) : empty_contiguous({0}, a.input),
                       shift_wanted ? empty_like(a.shift) : empty_contiguous({0}, a.shift)};
  shift_wanted = shift_wanted && a.shift.numel() > 0;
  const BoxesByImage by_image(source, p);
  const bool channels_last = is_channels_last(a.input);
  const Chunks adding = adding_chunks(p, channels_last, sizeof(AccOf<T>));
  const Chunks reading = reading_chunks(p, channels_last, sizeof(T));
  const Plans<AccOf<T>, Source> plans(source, p,
                                      (input_wanted ? adding.count(p) : 0) + (shift_wanted ? reading.count(p) : 0));
  const Backward<T, Source> b{p, source, plans, by_image, {grad.in<T>(), Strides4(grad), p.kh, p.kw}};
  if (input_wanted) input_gradient(b, adding, grads.input);
  if (shift_wanted) shift_gradient(b, reading, a.input, grads.shift.out<AccOf<T>>());
  return grads;
}

}  // namespace

Tensor roi_avg_pool(const Tensor& input, const Tensor& bins, const RoiGrid& grid, bool channels_last) {
  const RoiShape p = shape_of(input, bins, grid);
  const BinSource source = bins_of(bins, p);
  return by_dtype(input, [&](auto zero) { return forward<decltype(zero)>(input, source, p, channels_last); });
}

Tensor roi_avg_pool_backward(const Tensor& grad, const Tensor& input, const Tensor& bins, const RoiGrid& grid) {
  const RoiShape p = shape_of(input, bins, grid);
  check_grad(grad, input, p);
  return by_dtype(input, [&](auto zero) { return avg_backward<decltype(zero)>(grad, input, bins, p); });
}

Tensor deform_roi_pool(const DeformRoiArgs& args, bool channels_last) {
  const RoiShape p = shape_of(args.input, args.samples, args.grid);
  return by_dtype(args.input, [&](auto zero) {
    using T = decltype(zero);
    return forward<T>(args.input, samples_of<AccOf<T>>(args, p), p, channels_last);
  });
}

DeformRoiGrads deform_roi_pool_backward(const Tensor& grad, const DeformRoiArgs& args, bool input_wanted,
                                        bool shift_wanted) {
  const RoiShape p = shape_of(args.input, args.samples, args.grid);
  check_grad(grad, args.input, p);
  return by_dtype(args.input, [&](auto zero) {
    return deform_backward<decltype(zero)>(grad, args, p, input_wanted, shift_wanted);
  });
}

}  // namespace dcnseg_ops
