// The backward: the threads share the channels of the input, and each goes through all positions.
//
// Each number of the gradients of input and weight belongs to one channel, so that no two threads write one,
// and every sum has one order, whatever the number of threads. Only the gradients of offset and mask are sums
// over the channels: each thread keeps its own, for a stretch of positions, and these are added in the order of
// the threads.
//
// Per block of positions and step of the depth: the gradient rows times the weight are the gradients of the
// columns; from these come the gradients of positions and input; the columns are sampled once more, and the
// transposed gradient rows times the columns are added to the gradient of the weight. All of this stays in the
// cache.
//
// Memory beyond the arguments and gradients: the packed weight and sums of the weight's size; some megabytes
// per thread; kMostSums bytes for the position sums. An input that is not channels-last is copied, and a
// gradient that is not, or is not kept in the type of its sums, is summed apart: for as many images and
// channels at a time as kMostCopies bytes hold.
#include <memory>
#include "deform_conv2d.h"
#include "dtypes.h"
#include "layout.h"
#include "parts.h"
#include "product.h"
#include "sampling.h"
#include "values.h"
#include "weights.h"
namespace dcnseg_ops {
namespace {

constexpr int64_t kMostDepth = 320;         // of a step
constexpr int64_t kCacheBytes = 640 << 10;  // of a block's gradient rows, columns and column gradients
constexpr int64_t kLeastChannels = 16;      // of a thread: a cache line of float

// Channels [begin, end) of one convolution group, what a thread works on at a time.
struct Chunk {
  int64_t begin, end, group;
  size_t first_step, last_step;

  int64_t channels() const { return end - begin; }
};

// How the work is cut: into chunks of channels, parts and blocks of positions.
struct Division {
  std::vector<Chunk> chunks;
  std::vector<DepthStep> steps;  // of all chunks
  Parts parts;
  int64_t workers, block, stretch;  // stretch: positions whose sums a worker keeps
  int64_t most_channels = 0, most_depth = 0;

  int64_t rounds() const { return (static_cast<int64_t>(chunks.size()) + workers - 1) / workers; }
};

// Channels of a chunk and the parts. `copied_bytes`: what is copied and summed apart, per pixel and channel.
template <typename A>
int64_t divide_channels(const DeformConvParams& p, const Planes<A>& offset, int64_t copied_bytes, Parts& parts) {
  const int64_t threads = thread_count(), all_pixels = p.batch * p.height * p.width;
  const int64_t most = std::min(p.group_channels(), round_up((p.channels + threads - 1) / threads, kLeastChannels));
  parts.parts = {{0, p.positions(), 0, all_pixels}};
  const int64_t fit = kMostCopies / std::max<int64_t>(1, threads * copied_bytes);  // pixels times channels
  if (copied_bytes == 0 || all_pixels * most <= fit) return most;
  for (int64_t channels = std::min(most, 4 * kLeastChannels); channels >= std::min(most, kLeastChannels);
       channels /= 2) {
    parts = parts_of(p, offset, fit / channels);
    if (!parts.parts.empty()) return channels;
  }
  const int64_t channels = std::max<int64_t>(1, fit / (p.height * p.width));  // whole images
  parts = parts_of(p, offset, p.height * p.width);
  return channels;
}

template <typename A>
Division divide(const DeformConvParams& p, const Planes<A>& offset, int64_t element_bytes, int64_t copied_bytes,
                int64_t planes) {
  Division d;
  const int64_t channels = divide_channels(p, offset, copied_bytes, d.parts);
  for (int64_t group = 0; group < p.groups; ++group)
    for (int64_t c = group * p.group_channels(); c < (group + 1) * p.group_channels(); c += channels) {
      const int64_t end = std::min((group + 1) * p.group_channels(), c + channels);
      const size_t first = d.steps.size();
      for (DepthStep& step : depth_steps(p, c, end, kMostDepth)) {
        d.most_depth = std::max(d.most_depth, step.size());
        d.steps.push_back(std::move(step));
      }
      d.chunks.push_back({c, end, group, first, d.steps.size()});
      d.most_channels = std::max(d.most_channels, end - c);
    }
  d.workers = std::min<int64_t>(thread_count(), static_cast<int64_t>(d.chunks.size()));
  const int64_t row_bytes = 2 * (p.group_outputs() + d.most_depth) * element_bytes;
  d.block = std::max<int64_t>(2, kCacheBytes / row_bytes / 28) * 28;  // even, and whole tiles where rows are 14
  d.block = std::min(d.block, round_up(p.positions(), 2));
  const int64_t fit = kMostSums / (d.workers * std::max<int64_t>(1, planes) * element_bytes);
  d.stretch = std::max<int64_t>(1, fit / d.block) * d.block;
  d.stretch = std::min(d.stretch, round_up(p.positions(), d.block));
  return d;
}

// Gradient rows of a block as left matrices: [positions][outputs of the group], and transposed.
template <typename T, typename E>
class GradientRows {
 public:
  GradientRows(const DeformConvParams& p, const Tensor& grad, int64_t block)
      : p_(p),
        from_(grad.in<T>()),
        s_(grad),
        is_channels_last_(is_channels_last(grad)),
        are_planes_((s_.s[3] == 1 || p.out_width == 1) && (s_.s[2] == p.out_width || p.out_height == 1)),
        row_size_(round_up(p.group_outputs(), 16) + 16),
        column_size_(round_up(block, 16) + 16),
        block_(block) {}

  void make(int64_t begin, int64_t end, int64_t group, bool transposed_wanted) {
    const int64_t outputs = p_.group_outputs(), n = end - begin;
    constexpr bool kPairs = std::is_same_v<E, bf16>;
    if (std::is_same_v<T, E> && is_channels_last_ && (!kPairs || outputs % 2 == 0)) {
      rows = reinterpret_cast<const E*>(from_) + begin * p_.out_channels + group * outputs;
      row_stride = p_.out_channels;
    } else {
      E* to = rows_buffer_.get(block_ * row_size_);
      copy_rows(begin, end, group, to);
      if (kPairs && outputs % 2)
        for (int64_t j = 0; j < n; ++j) to[j * row_size_ + outputs] = E{};
      rows = to;
      row_stride = row_size_;
    }
    if (!transposed_wanted) return;
    const int64_t image = begin / p_.out_pixels();
    if (std::is_same_v<T, E> && are_planes_ && (end - 1) / p_.out_pixels() == image && (!kPairs || n % 2 == 0)) {
      columns =
          reinterpret_cast<const E*>(from_) + image * s_.s[0] + group * outputs * s_.s[1] + begin % p_.out_pixels();
      column_stride = s_.s[1];
      return;
    }
    E* to = columns_buffer_.get(outputs * column_size_);
    transpose_block(rows, row_stride, to, column_size_, n, outputs);
    if (kPairs && n % 2)
      for (int64_t o = 0; o < outputs; ++o) to[o * column_size_ + n] = E{};
    columns = to;
    column_stride = column_size_;
  }

  const E *rows = nullptr, *columns = nullptr;
  int64_t row_stride = 0, column_stride = 0;

 private:
  void copy_rows(int64_t begin, int64_t end, int64_t group, E* to) const {
    const int64_t outputs = p_.group_outputs(), pixels = p_.out_pixels();
    for_images(begin, end, pixels, [&](int64_t image, int64_t pixel, int64_t n, int64_t before) {
      const T* planes = from_ + image * s_.s[0] + group * outputs * s_.s[1];
      E* rows_to = to + before * row_size_;
      if constexpr (std::is_same_v<T, E>)
        if (are_planes_) return transpose_block(planes + pixel, s_.s[1], rows_to, row_size_, outputs, n);
      for (int64_t j = 0; j < n; ++j) {
        const T* source = planes + (pixel + j) / p_.out_width * s_.s[2] + (pixel + j) % p_.out_width * s_.s[3];
        for (int64_t o = 0; o < outputs; ++o)
          store_one(rows_to + j * row_size_ + o, static_cast<AccOf<E>>(load_one(source + o * s_.s[1])));
      }
    });
  }

  const DeformConvParams& p_;
  const T* from_;
  Strides4 s_;
  bool is_channels_last_, are_planes_;
  int64_t row_size_, column_size_, block_;
  Buffer<E> rows_buffer_, columns_buffer_;
};

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
        planes_((wanted.offset || wanted.mask ? 2 : 0) * p_.offset_groups * p_.taps() +
                (wanted.mask ? p_.offset_groups * p_.taps() : 0)),
        copies_input_(!is_channels_last(a.input)),
        sums_apart_(wanted.input && !(std::is_same_v<T, A> && is_channels_last(grads.input))),
        division_(divide(p_, planes_of<A>(a.offset), sizeof(A),
                         (copies_input_ ? sizeof(T) : 0) + (sums_apart_ ? sizeof(A) : 0), planes_)),
        offsets_(division_.steps, [&](const DepthStep& step) { return column_panels<E>(p_, step); }),
        zeros_(static_cast<size_t>(p_.channels), T{}) {}

  void run() {
    if (wants_column_gradients())
      pack_weight_backward(p_, Weight<T>(a_.weight), division_.steps, offsets_, weight_.get(offsets_.size));
    if (wanted_.weight) weight_sums_.get(p_.out_channels * p_.depth());
    if (wanted_.input && (!sums_apart_ || division_.parts.overlap))
      zero(grads_.input.template out<T>(), grads_.input.numel());
    for (int64_t w = 0; w < division_.workers; ++w)
      workers_.push_back(std::make_unique<Worker>(p_, grad_, division_.block));
    for (const Part& part : division_.parts.parts)
      for (int64_t round = 0; round < division_.rounds(); ++round) go_through_part(part, round);
    if (wanted_.weight) unpack_weight_gradient<T>(p_, division_.steps, weight_sums_.get(0), grads_.weight);
  }

 private:
  struct Worker {  // what a thread keeps from block to block
    GradientRows<T, E> gradient;
    StepPlans<T> plans;
    Buffer<A> column_gradients, position_sums, input_sums, waste;
    Buffer<E> samples;
    Buffer<T> input;

    Worker(const DeformConvParams& p, const Tensor& grad, int64_t block) : gradient(p, grad, block) {}
  };

  bool wants_column_gradients() const { return wanted_.input || planes_ > 0; }

  static void zero(T* data, int64_t count) {
    parallel_for(0, count, 65536, [&](int64_t b, int64_t e) { std::fill(data + b, data + e, T{}); });
  }

  // One chunk of channels for each worker.
  void go_through_part(const Part& part, int64_t round) {
    const int64_t first_chunk = round * division_.workers;
    const int64_t active = std::min(division_.workers, static_cast<int64_t>(division_.chunks.size()) - first_chunk);
    for (int64_t begin = part.begin; begin < part.end; begin += division_.stretch) {
      const int64_t end = std::min(part.end, begin + division_.stretch);
      for_slots(active, [&](int64_t w) {
        Worker& worker = *workers_[w];
        const Chunk& chunk = division_.chunks[first_chunk + w];
        if (begin == part.begin) start_chunk(worker, chunk, part);
        if (planes_ > 0) {
          A* sums = worker.position_sums.get(planes_ * division_.stretch);
          std::fill(sums, sums + planes_ * division_.stretch, A(0));
        }
        for (int64_t at = begin; at < end; at += division_.block)
          go_through_block(worker, chunk, part, begin, at, std::min(end, at + division_.block));
        if (end == part.end) finish_chunk(worker, chunk, part);
      });
      if (planes_ > 0) add_position_sums_of(active, begin, end, round > 0);
    }
  }

  void start_chunk(Worker& worker, const Chunk& chunk, const Part& part) {
    const int64_t pixels = p_.height * p_.width, count = part.last_pixel - part.first_pixel;
    const int64_t most = division_.parts.most_pixels() * division_.most_channels, channels = chunk.channels();
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
    s.zeros = distance(s.input, zeros_.data());
    return s;
  }

  void go_through_block(Worker& worker, const Chunk& chunk, const Part& part, int64_t stretch_begin, int64_t begin,
                        int64_t end) {
    const int64_t outputs = p_.group_outputs(), n = end - begin,
                  column_stride = round_up(division_.most_depth, 16) + 16;
    const Sampler<T> sampler = sampler_of(worker, chunk, part);
    worker.gradient.make(begin, end, chunk.group, wanted_.weight);
    BackwardPass<T, E> pass;
    if (planes_ > 0) {
      pass.position_sums = worker.position_sums.get(0);
      pass.plane_stride = division_.stretch;
      pass.first_position = stretch_begin;
      pass.mask_wanted = wanted_.mask;
    }
    if (wanted_.input) {
      pass.waste = worker.waste.get(division_.most_channels);
      pass.sums_stride = sums_apart_ ? chunk.channels() : p_.channels;
      if (sums_apart_)
        pass.input_sums = shifted(worker.input_sums.get(0), -(part.first_pixel * pass.sums_stride + chunk.begin));
      else if constexpr (std::is_same_v<T, A>)
        pass.input_sums = grads_.input.template out<A>();
    }
    A* column_gradients =
        wants_column_gradients() ? worker.column_gradients.get(division_.block * column_stride) : nullptr;
    pass.grad_columns = column_gradients;
    pass.grad_stride = column_stride;
    const Panels<E> most{division_.block, division_.most_depth};
    if (wanted_.weight) pass.samples = worker.samples.get(most.size());
    pass.panel_width_log2 = Panels<E>::width_log2();
    A* weight_sums = wanted_.weight ? weight_sums_.get(0) : nullptr;
    for (size_t i = chunk.first_step; i < chunk.last_step; ++i) {
      const DepthStep& step = division_.steps[i];
      if (column_gradients)
        multiply(worker.gradient.rows, worker.gradient.row_stride, n, weight_.get(0) + offsets_.begin[i],
                 column_panels<E>(p_, step).panel_size(), column_panels<E>(p_, step), column_gradients, column_stride,
                 false);
      const Panels<E> columns{n, step.size()};
      pass.panel_size = columns.panel_size();
      backward_step(sampler, step, begin, end, worker.plans, pass);
      if (weight_sums)
        multiply(worker.gradient.columns, worker.gradient.column_stride, outputs, pass.samples, pass.panel_size,
                 columns, weight_sums + outputs * first_column(i), step.size(), begin > 0);
    }
  }

  // Columns of all steps before this one.
  int64_t first_column(size_t step) const {
    int64_t columns = 0;
    for (size_t i = 0; i < step; ++i) columns += division_.steps[i].size();
    return columns;
  }

  void finish_chunk(Worker& worker, const Chunk& chunk, const Part& part) {
    if (!sums_apart_) return;
    constexpr int64_t kPixels = 256;
    const int64_t pixels = p_.height * p_.width, channels = chunk.channels();
    Buffer<A> turned;
    turned.get(kPixels * channels);
    for_images(part.first_pixel, part.last_pixel, pixels, [&](int64_t image, int64_t pixel, int64_t n, int64_t before) {
      T* grad = grads_.input.template out<T>() + image * p_.channels * pixels;
      for (int64_t at = 0; at < n; at += kPixels) {
        const int64_t count = std::min(kPixels, n - at);
        const A* sums = worker.input_sums.get(0) + (before + at) * channels;
        if (is_channels_last(grads_.input)) {
          for (int64_t j = 0; j < count; ++j)
            put_sums(sums + j * channels, channels, grad + (pixel + at + j) * p_.channels + chunk.begin);
        } else {
          transpose_block(sums, channels, turned.get(0), count, count, channels);
          for (int64_t c = 0; c < channels; ++c)
            put_sums(turned.get(0) + c * count, count, grad + (chunk.begin + c) * pixels + pixel + at);
        }
      }
    });
  }

  // To the gradient; added, where another part has pixels of this one.
  void put_sums(const A* sums, int64_t count, T* to) const {
    if (division_.parts.overlap)
      add_converted(sums, count, to);
    else
      convert_values(sums, count, to);
  }

  // The workers' sums of positions [begin, end) to the gradients of offset and mask, in their order.
  void add_position_sums_of(int64_t workers, int64_t begin, int64_t end, bool accumulate) {
    const int64_t pixels = p_.out_pixels(), offset_planes = 2 * p_.offset_groups * p_.taps();
    A* offset = wanted_.offset ? grads_.offset.template out<A>() : nullptr;
    A* mask = wanted_.mask ? grads_.mask.template out<A>() : nullptr;
    parallel_for(0, planes_, grain((end - begin) * workers), [&](int64_t first, int64_t last) {
      for (int64_t plane = first; plane < last; ++plane)
        for_images(begin, end, pixels, [&](int64_t image, int64_t pixel, int64_t n, int64_t before) {
          A* to;
          if (plane < offset_planes)
            to = offset ? offset + (image * offset_planes + plane) * pixels + pixel : nullptr;
          else
            to = mask + (image * (offset_planes / 2) + plane - offset_planes) * pixels + pixel;
          for (int64_t w = 0; to && w < workers; ++w) {
            const A* from = workers_[w]->position_sums.get(0) + plane * division_.stretch + before;
            if (w == 0 && !accumulate)
              std::copy_n(from, n, to);
            else
              add_values(from, n, to);
          }
        });
    });
  }

  const DeformConvArgs& a_;
  const DeformConvParams& p_;
  const Tensor& grad_;
  DeformConvGrads& grads_;
  WantedGrads wanted_;
  int64_t planes_;  // of the position sums
  bool copies_input_, sums_apart_;
  Division division_;
  StepOffsets<E> offsets_;
  std::vector<T> zeros_;
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
  else if (wanted.weight)
    fill_with_zeros<T>(grads.weight);
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
