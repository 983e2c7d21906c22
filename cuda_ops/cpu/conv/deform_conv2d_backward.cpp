// The backward of the deformable convolution.
//
// The threads divide the channels of the input, and each processes all positions, so that every element of the
// gradients of input and weight is written by one thread. The gradients of offset and mask are sums over the channels:
// each thread sums its own channels for a stretch of positions, and these sums are added in the order of the threads.
// The result is deterministic for a given number of threads.
//
// For each block of positions and step of the depth: the gradient rows times the weight are the column gradients; from
// these follow the gradients of positions and input; the columns are sampled again, and the transposed gradient rows
// times the columns are added to the gradient of the weight. All of this stays in the L2 cache.
//
// Memory in addition to arguments and gradients: the packed weight and sums of the size of the weight; a few megabytes
// per thread; kMaxSums bytes for the position sums. An input that is not channels-last is copied. A gradient that is
// not channels-last, or whose sums have a different type, is summed in a buffer. Both are limited to kMaxCopies bytes
// at a time, by parts and chunks of channels. Where parts share pixels, the gradient is rounded once per part. Only a
// map of which a single channel exceeds the limit, with offsets across the whole map, takes more.
#include <memory>
#include "cpu/conv/backward_division.h"
#include "cpu/conv/backward_step.h"
#include "cpu/conv/deform_conv2d.h"
#include "cpu/conv/gradient_rows.h"
#include "cpu/conv/weights.h"
#include "cpu/gemm/product.h"
#include "cpu/values.h"
namespace dcnseg_ops {
namespace {

template <typename T, typename E>
class Backward {
  using A = AccOf<T>;

 public:
  Backward(const Tensor& grad, const DeformConvArgs& a, DeformConvGrads& grads, WantedGrads wanted)
      : a_(a),
        p_(a.params),
        grad_(grad),
        grads_(grads),
        wanted_(wanted),
        sum_planes_(wanted.mask     ? 3
                    : wanted.offset ? 2
                                    : 0),
        copies_input_(!is_channels_last(a.input)),
        sums_apart_(wanted.input && !(std::is_same_v<T, A> && is_channels_last(grads.input))),
        division_(divide(p_, planes_of<A>(a.offset), (copies_input_ ? sizeof(T) : 0) + (sums_apart_ ? sizeof(A) : 0),
                         sum_planes_)),
        offsets_(division_.steps, [&](const DepthStep& step) { return column_panels<E>(p_, step); }),
        zeros_(static_cast<size_t>(p_.channels) + 2, T{}) {}

  void run() {
    if (wants_column_gradients())
      pack_weight_backward(p_, Weight<T>(a_.weight), division_.steps, offsets_, weight_.get(offsets_.size));
    if (wanted_.weight) weight_sums_.get(p_.out_channels * p_.depth());
    int64_t sums = 0;
    for (const DepthStep& step : division_.steps) {
      weight_sum_begin_.push_back(sums);
      sums += p_.group_outputs() * step.size();
    }
    if (wanted_.input && (!sums_apart_ || division_.parts.overlap)) zero<T>(grads_.input);
    if (wanted_.offset) zero<A>(grads_.offset);
    if (wanted_.mask) zero<A>(grads_.mask);
    for (int64_t w = 0; w < division_.workers; ++w)
      workers_.push_back(std::make_unique<Worker>(p_, grad_, division_.block, sum_planes_ > 0));
    for (const Part& part : division_.parts.parts)
      for (int64_t round = 0; round < division_.rounds(); ++round) go_through_part(part, round);
    if (wanted_.weight) unpack_weight_gradient<T>(p_, division_.steps, weight_sums_.get(0), grads_.weight);
  }

 private:
  struct Worker {  // state of a thread that is reused between blocks
    GradientRows<T, E> gradient;
    StepPlans<T> plans;
    Buffer<A> column_gradients, position_sums, input_sums, waste;
    Buffer<E> samples;
    Buffer<T> input;

    Worker(const DeformConvParams& p, const Tensor& grad, int64_t block, bool fractions_wanted)
        : gradient(p, grad, block), plans(fractions_wanted) {}
  };

  bool wants_column_gradients() const { return wanted_.input || sum_planes_ > 0; }

  template <typename N>
  static void zero(const Tensor& t) {
    N* data = t.out<N>();
    parallel_for(0, t.numel(), 65536, [&](int64_t b, int64_t e) { std::fill(data + b, data + e, N{}); });
  }

  // One chunk of channels per worker.
  void go_through_part(const Part& part, int64_t round) {
    const int64_t first_chunk = round * division_.workers;
    const int64_t active = std::min(division_.workers, static_cast<int64_t>(division_.chunks.size()) - first_chunk);
    for (int64_t begin = part.begin; begin < part.end; begin += division_.stretch) {
      const int64_t end = std::min(part.end, begin + division_.stretch);
      for_slots(active, [&](int64_t w) {
        Worker& worker = *workers_[w];
        const Chunk& chunk = division_.chunks[first_chunk + w];
        if (begin == part.begin) start_chunk(worker, chunk, part);
        if (sum_planes_ > 0) {
          A* sums = worker.position_sums.get(sum_planes_ * division_.max_planes * division_.stretch);
          std::fill(sums, sums + sum_planes_ * chunk.planes() * division_.stretch, A(0));
        }
        for (int64_t at = begin; at < end; at += division_.block)
          go_through_block(worker, chunk, part, begin, at, std::min(end, at + division_.block));
        if (end == part.end) finish_chunk(worker, chunk, part);
      });
      if (sum_planes_ > 0) add_position_sums_of(first_chunk, active, begin, end);
    }
  }

  void start_chunk(Worker& worker, const Chunk& chunk, const Part& part) {
    const int64_t pixels = p_.height * p_.width, count = part.last_pixel - part.first_pixel;
    const int64_t most = division_.parts.max_pixels() * division_.max_channels, channels = chunk.channels();
    if (copies_input_) {
      T* to = worker.input.get(most);
      const T* from = a_.input.template in<T>() + chunk.begin * pixels;
      for_images(part.first_pixel, part.last_pixel, pixels,
                 [&](int64_t image, int64_t pixel, int64_t n, int64_t before) {
                   transpose_block(from + image * p_.channels * pixels + pixel, pixels, to + before * channels,
                                   channels, channels, n);
                 });
    }
    if (sums_apart_) {
      A* sums = worker.input_sums.get(most);
      std::fill(sums, sums + count * channels, A(0));
    }
  }

  Sampler<T> sampler_of(Worker& worker, const Chunk& chunk, const Part& part) const {
    Sampler<T> s{p_, nullptr, p_.channels, nullptr, 0, planes_of<A>(a_.offset), planes_of<A>(a_.mask)};
    if (copies_input_) {
      s.pixel_stride = chunk.channels();
      s.input = shifted<const T>(worker.input.get(0), -(part.first_pixel * s.pixel_stride + chunk.begin));
    } else {
      s.input = a_.input.template in<T>();
    }
    s.zeros = distance<T>(s.input, zeros_.data() + 1);
    return s;
  }

  // Outputs of a block, except for those that differ between steps.
  BackwardPass<T, E> pass_of(Worker& worker, const Chunk& chunk, const Part& part, int64_t stretch_begin) {
    BackwardPass<T, E> pass;
    pass.grad_stride =
        round_up(division_.max_depth, 16) + 16;  // not a power of two, where rows would map to the same cache sets
    if (wants_column_gradients()) pass.grad_columns = worker.column_gradients.get(division_.block * pass.grad_stride);
    if (sum_planes_ > 0) {
      pass.position_sums = worker.position_sums.get(0);
      pass.plane_stride = division_.stretch;
      pass.first_position = stretch_begin;
      pass.first_plane = chunk.first_plane;
      pass.planes = chunk.planes();
      pass.mask_wanted = wanted_.mask;
    }
    if (wanted_.input) {
      pass.waste = worker.waste.get(division_.max_channels);
      pass.sums_stride = sums_apart_ ? chunk.channels() : p_.channels;
      if (sums_apart_)
        pass.input_sums = shifted(worker.input_sums.get(0), -(part.first_pixel * pass.sums_stride + chunk.begin));
      else if constexpr (std::is_same_v<T, A>)
        pass.input_sums = grads_.input.template out<A>();
    }
    if (wanted_.weight)
      pass.samples = {worker.samples.get(Panels<E>{division_.block, division_.max_depth}.size()), 0,
                      Panels<E>::width_log2()};
    return pass;
  }

  void go_through_block(Worker& worker, const Chunk& chunk, const Part& part, int64_t stretch_begin, int64_t begin,
                        int64_t end) {
    const Sampler<T> sampler = sampler_of(worker, chunk, part);
    GradientRows<T, E>& gradient = worker.gradient;
    gradient.make(begin, end, chunk.group, wanted_.weight);
    BackwardPass<T, E> pass = pass_of(worker, chunk, part, stretch_begin);
    for (size_t i = chunk.first_step; i < chunk.last_step; ++i) {
      const DepthStep& step = division_.steps[i];
      const Panels<E> weight = column_panels<E>(p_, step), columns{end - begin, step.size()};
      if (pass.grad_columns)
        multiply(gradient.rows, gradient.row_stride, end - begin, weight_.get(0) + offsets_.begin[i],
                 weight.panel_size(), weight, worker.column_gradients.get(0), pass.grad_stride, false);
      pass.samples.panel_size = columns.panel_size();
      backward_step(sampler, step, begin, end, worker.plans, pass);
      if (wanted_.weight)
        multiply(gradient.columns, gradient.column_stride, p_.group_outputs(), pass.samples.data,
                 pass.samples.panel_size, columns, weight_sums_.get(0) + weight_sum_begin_[i], step.size(), begin > 0);
    }
  }

  void finish_chunk(Worker& worker, const Chunk& chunk, const Part& part) {
    if (!sums_apart_) return;
    constexpr int64_t kPixels = 256;
    const int64_t pixels = p_.height * p_.width, channels = chunk.channels();
    Buffer<A> buffer;
    for_images(part.first_pixel, part.last_pixel, pixels, [&](int64_t image, int64_t pixel, int64_t n, int64_t before) {
      T* grad = grads_.input.template out<T>() + image * p_.channels * pixels;
      for (int64_t at = 0; at < n; at += kPixels) {
        const int64_t count = std::min(kPixels, n - at);
        const A* sums = worker.input_sums.get(0) + (before + at) * channels;
        if (is_channels_last(grads_.input)) {
          for (int64_t j = 0; j < count; ++j)
            put_sums(sums + j * channels, channels, grad + (pixel + at + j) * p_.channels + chunk.begin);
        } else if (std::is_same_v<T, A> && !division_.parts.overlap) {
          transpose_block(sums, channels, reinterpret_cast<A*>(grad) + chunk.begin * pixels + pixel + at, pixels, count,
                          channels);
        } else {
          A* turned = buffer.get(kPixels * channels);
          transpose_block(sums, channels, turned, count, count, channels);
          for (int64_t c = 0; c < channels; ++c)
            put_sums(turned + c * count, count, grad + (chunk.begin + c) * pixels + pixel + at);
        }
      }
    });
  }

  // Writes sums to the gradient; adds where another part shares pixels.
  void put_sums(const A* sums, int64_t count, T* to) const {
    if (division_.parts.overlap)
      add_converted(sums, count, to);
    else
      convert_values(sums, count, to);
  }

  // Adds the workers' sums of positions [begin, end) to the gradients of offset and mask, in the order of the workers.
  void add_position_sums_of(int64_t first_chunk, int64_t workers, int64_t begin, int64_t end) {
    const int64_t planes = p_.offset_groups * p_.taps();
    parallel_for(0, planes, grain(sum_planes_ * (end - begin)), [&](int64_t first, int64_t last) {
      for (int64_t plane = first; plane < last; ++plane)
        for (int64_t w = 0; w < workers; ++w) {
          const Chunk& chunk = division_.chunks[first_chunk + w];
          if (plane < chunk.first_plane || plane >= chunk.last_plane) continue;
          const A* sums = workers_[w]->position_sums.get(0);
          const int64_t local = plane - chunk.first_plane;
          for (int64_t xy = 0; wanted_.offset && xy < 2; ++xy)
            add_to_plane(sums + (2 * local + xy) * division_.stretch, begin, end, 2 * planes, 2 * plane + xy,
                         grads_.offset);
          if (wanted_.mask)
            add_to_plane(sums + (2 * chunk.planes() + local) * division_.stretch, begin, end, planes, plane,
                         grads_.mask);
        }
    });
  }

  // Writes the sums of positions [begin, end) to one of the `planes` planes [H_out, W_out] of each image.
  void add_to_plane(const A* sums, int64_t begin, int64_t end, int64_t planes, int64_t plane,
                    const Tensor& grad) const {
    A* to = grad.out<A>();
    const int64_t pixels = p_.out_pixels();
    for_images(begin, end, pixels, [&](int64_t image, int64_t pixel, int64_t n, int64_t before) {
      add_values(sums + before, n, to + (image * planes + plane) * pixels + pixel);
    });
  }

  const DeformConvArgs& a_;
  const DeformConvParams& p_;
  const Tensor& grad_;
  DeformConvGrads& grads_;
  WantedGrads wanted_;
  int64_t sum_planes_;  // number of position sums per plane: 2 for the offset, 3 with the mask
  bool copies_input_, sums_apart_;
  Division division_;
  StepOffsets<E> offsets_;
  std::vector<T> zeros_;
  std::vector<int64_t> weight_sum_begin_;  // per step
  Buffer<E> weight_;
  Buffer<A> weight_sums_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

template <typename T>
void fill_with_zeros(const Tensor& t) {
  std::fill(t.out<T>(), t.out<T>() + t.numel(), T{});
}

template <typename T, typename E>
DeformConvGrads backward(const Tensor& grad, const DeformConvArgs& a, WantedGrads wanted) {
  const DeformConvParams& p = a.params;
  const auto like = [](bool is_wanted, const Tensor& t) {
    return is_wanted ? empty_like(t) : empty_contiguous({0}, t);
  };
  const auto planes = [&](bool is_wanted, int64_t channels) {
    return empty_contiguous(
        is_wanted ? std::vector<int64_t>{p.batch, channels, p.out_height, p.out_width} : std::vector<int64_t>{0},
        a.offset);
  };
  DeformConvGrads grads = {like(wanted.input, a.input), planes(wanted.offset, 2 * p.offset_groups * p.taps()),
                           planes(wanted.mask, p.offset_groups * p.taps()), like(wanted.weight, a.weight)};
  if (p.positions() > 0)
    Backward<T, E>(grad, a, grads, wanted).run();
  else
    for (const Tensor* t : {&grads.input, &grads.weight}) fill_with_zeros<T>(*t);  // empty if not needed
  return grads;
}

}  // namespace

DeformConvGrads deform_conv2d_backward(const Tensor& grad, const DeformConvArgs& args, WantedGrads wanted) {
  check_density(args);
  check_grad(grad, args.input, args.params);
  return by_product_types(args.input, [&](auto value, auto element) {
    return backward<decltype(value), decltype(element)>(grad, args, wanted);
  });
}

}  // namespace dcnseg_ops
