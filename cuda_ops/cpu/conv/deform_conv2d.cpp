// The forward of the deformable convolution.
//
// Threads process blocks of output positions. For each step of the depth, a thread samples the columns of some
// positions of its block and multiplies them by all weight panels of the step while they are in the L2 cache. The
// thread that needs a weight panel first packs the part of the step; the input is copied in the same way where
// necessary.
//
// Memory in addition to input and output: the packed weight; one or two megabytes per thread; for an input that is not
// channels-last, a channels-last copy by chunks of channels, limited to kMaxCopies bytes at a time. Where offsets are
// too large for that, the planes of the input are sampled directly.
#include "cpu/conv/deform_conv2d.h"
#include <atomic>
#include <cassert>
#include "cpu/conv/copied_input.h"
#include "cpu/conv/forward_weight.h"
#include "cpu/conv/sampling.h"
#include "cpu/gemm/product.h"
#include "cpu/layout.h"
#include "cpu/parts.h"
#include "cpu/values.h"
namespace dcnseg_ops {
namespace {

#if defined(DCN_LITTLE_MEMORY)  // set by a test build, in which small cases reach the limits
constexpr int64_t kDepthBytes = 96, kMinRows = 4, kMaxRows = 32, kMaxRowBytes = 4096;
#else
constexpr int64_t kDepthBytes = 2304;      // per row of columns: 576 in float, 9 taps of 64 channels
constexpr int64_t kMinRows = 84;           // per block, except in the last round
constexpr int64_t kMaxRows = 672;          // per block; the weight is read once per block
constexpr int64_t kMaxRowBytes = 3 << 19;  // per block, for sums that cannot be stored in the output
#endif

// Blocks of positions of at most `max_rows`, in multiples of the tile height except for the last one. Threads take
// the next block when they finish one. Each round has one block per thread. The first rounds are large, because each
// block reads the whole weight; the last ones are small, so that all threads finish at about the same time. With one
// thread all blocks have the same size.
class Blocks {
 public:
  Blocks(int64_t begin, int64_t end, int64_t tile, int64_t max_rows, int64_t max_threads) {
    const int64_t tiles = (end - begin + tile - 1) / tile, fit = std::max<int64_t>(1, max_rows / tile);
    threads_ = std::min(max_threads, tiles);
    for (int64_t first = 0; first < tiles;) {
      const int64_t left = tiles - first, size = left * 3 / (4 * threads_);
      const bool is_last = threads_ == 1 || size * tile < kMinRows;
      const int64_t count = is_last ? std::min(left, round_up((left + fit - 1) / fit, threads_)) : threads_;
      const int64_t taken = is_last ? left : count * std::min(size, fit);
      for (int64_t i = 0; i < count; ++i) begins_.push_back(begin + (first + taken * i / count) * tile);
      first += taken;
    }
    begins_.push_back(end);
  }
  int64_t threads() const { return threads_; }
  int64_t count() const { return static_cast<int64_t>(begins_.size()) - 1; }
  int64_t begin(int64_t block) const { return begins_[static_cast<size_t>(block)]; }
  int64_t most() const {
    int64_t most = 0;
    for (int64_t i = 0; i < count(); ++i) most = std::max(most, begin(i + 1) - begin(i));
    return most;
  }

 private:
  int64_t threads_;
  std::vector<int64_t> begins_;
};

// The rows [positions][C_out] in which the GEMM of a block is summed, and their conversion to the output.
template <typename T>
struct OutputRows {
  using A = AccOf<T>;
  const DeformConvParams& p;
  const T* bias;
  T* out;
  bool channels_last;

  // Whether the sums can be stored in the output.
  bool is_direct() const { return channels_last && std::is_same_v<T, A>; }

  A* direct(int64_t begin) const { return reinterpret_cast<A*>(out) + begin * p.out_channels; }
  void finish(int64_t begin, int64_t end, A* rows, T* rounded) const {
    const int64_t n = p.out_channels, pixels = p.out_pixels();
    if (bias) add_bias_to_rows(rows, end - begin, n, bias);
    if (is_direct()) return;
    const T* from = rounded;
    if constexpr (std::is_same_v<T, A>)
      from = rows;
    else
      convert_values(rows, (end - begin) * n, channels_last ? out + begin * n : rounded);
    if (channels_last) return;
    for_images(begin, end, pixels, [&](int64_t image, int64_t pixel, int64_t count, int64_t before) {
      transpose_block(from + before * n, n, out + image * n * pixels + pixel, pixels, count, n);
    });
  }
};

template <typename T, typename E>
class Forward {
  using A = AccOf<T>;

 public:
  Forward(const DeformConvArgs& a, OutputRows<T> output)
      : a_(a),
        p_(a.params),
        output_(output),
        tile_(forward_panels<E>(p_.group_outputs())[0].kernel->rows),  // others end with a smaller tile
        sampled_(kBlock / tile_ * tile_),
        chunks_(channel_chunks(p_, kMaxDepth)),
        steps_(chunk_steps(p_, chunks_, kMaxDepth)),
        zeros_(static_cast<size_t>(p_.channels) + 2, T{}) {
    assert(are_alike(p_, steps_));
    for (const DepthStep& step : steps_[0]) stride_ = std::max(stride_, step.size());
    stride_ = round_up(stride_, 16) + 16;  // not a power of two, where rows would map to the same cache sets
  }

  void run() {
    ForwardWeight<T, E> weight(p_, a_.weight, chunks_, steps_[0]);
    Sampler<T> s{p_, nullptr, p_.channels, nullptr, 0, planes_of<A>(a_.offset), planes_of<A>(a_.mask)};
    const Part all{0, p_.positions(), 0, p_.batch * p_.height * p_.width};
    if (is_channels_last(a_.input)) {
      s.input = a_.input.template in<T>();
      s.zeros = distance<T>(s.input, zeros_.data() + 1);
      return go_through(all, s, weight);
    }
    const int64_t row_bytes = p_.channels * static_cast<int64_t>(sizeof(T));
    const Parts parts = parts_of(p_, s.offset, kMaxCopies / row_bytes);
    if (parts.parts.empty()) {
      s.planes = a_.input.template in<T>();
      return go_through(all, s, weight);
    }
    CopiedInput<T> copy(p_, a_.input, chunks_, parts.max_pixels());
    s.chunks = chunks_;
    s.pixel_stride = chunks_.channels;
    for (const Part& part : parts.parts) {
      copy.start(part);
      s.chunk_stride = copy.chunk_stride();
      s.input = copy.pixel_0();
      s.zeros = copy.zeros();
      go_through(part, s, weight, &copy);
    }
  }

 private:
  static constexpr int64_t kMaxDepth = kDepthBytes / static_cast<int64_t>(sizeof(E));

  // `copy`: what the sampler reads, or null if it reads the input.
  void go_through(const Part& part, const Sampler<T>& sampler, ForwardWeight<T, E>& weight,
                  CopiedInput<T>* copy = nullptr) {
    const int64_t sum_bytes = output_.is_direct() ? 0 : p_.out_channels * static_cast<int64_t>(sizeof(A));
    const int64_t max_rows = sum_bytes ? std::min(kMaxRows, kMaxRowBytes / sum_bytes) : kMaxRows;
    const Blocks blocks(part.begin, part.end, tile_, max_rows, thread_count());
    std::atomic<int64_t> next{0};
    for_slots(blocks.threads(), [&](int64_t slot) {
      Buffer<E> columns;
      Buffer<A> sums;
      Buffer<T> rounded, buffer;
      std::vector<StepPlans<T>> plans;  // per stretch of a block, if steps share them
      const int64_t first_panel =
          slot * weight.panel_count() / blocks.threads();  // each thread starts with a different panel and packs some
      columns.get(sampled_ * stride_);
      if (!output_.is_direct()) sums.get(blocks.most() * p_.out_channels);
      if (!std::is_same_v<T, A> && !output_.channels_last) rounded.get(sampled_ * p_.out_channels);
      for (int64_t block; (block = next++) < blocks.count();) {
        const int64_t begin = blocks.begin(block), end = blocks.begin(block + 1);
        const Blocks stretches(begin, end, tile_, sampled_, 1);
        const size_t kept = steps_[0].size() > 1 ? static_cast<size_t>(stretches.count()) : 1;
        if (plans.size() < kept) plans.resize(kept, StepPlans<T>(false));
        A* rows = output_.is_direct() ? output_.direct(begin) : sums.get(0);
        for (int64_t group = 0; group < p_.groups; ++group)
          for (size_t i = 0; i < steps_[group].size(); ++i) {
            const bool is_last = group + 1 == p_.groups && i + 1 == steps_[group].size();
            const DepthStep& step = steps_[group][i];
            if (copy) copy->need(chunks_.index(step.channel_begin));
            for (int64_t stretch = 0; stretch < stretches.count(); ++stretch) {
              const int64_t first = stretches.begin(stretch), last = stretches.begin(stretch + 1);
              sample(sampler, step, first, last, plans[stretch % kept], columns.get(0));
              A* to = rows + (first - begin) * p_.out_channels;
              multiply_all(columns.get(0), last - first, weight, group, i, first_panel, buffer, to);
              if (is_last) output_.finish(first, last, to, rounded.get(0));  // while the sums are in the cache
            }
          }
      }
    });
  }

  void sample(const Sampler<T>& sampler, const DepthStep& step, int64_t begin, int64_t end, StepPlans<T>& plans,
              E* columns) const {
    assert(step.size() <= stride_);
    if (sampler.input)
      sample_rows(sampler, step, begin, end, plans, columns, stride_);
    else
      sample_rows_of_planes(sampler, step, begin, end, plans, columns, stride_);
    if (step.size() % 2 && std::is_same_v<E, bf16>)  // second element of a pair
      for (int64_t j = 0; j < end - begin; ++j) columns[j * stride_ + step.size()] = E{};
  }

  // Columns times all panels, starting with `first_panel`.
  void multiply_all(const E* columns, int64_t rows, ForwardWeight<T, E>& weight, int64_t group, size_t step,
                    int64_t first_panel, Buffer<T>& buffer, A* sums) const {
    const int64_t count = weight.panel_count();
    for (int64_t i = 0, index = first_panel; i < count; ++i) {
      const ForwardPanel<E>& panel = weight.panel(index);
      const int64_t next = index + 1 < count ? index + 1 : 0;
      multiply_panel(*panel.kernel, columns, stride_, rows, weight.packed(group, index, step, buffer),
                     steps_[group][step].size(), panel.outputs, weight.part(group, next, step),
                     weight.part_size(next, step), sums + group * p_.group_outputs() + panel.first, p_.out_channels,
                     step > 0);
      index = next;
    }
  }

  const DeformConvArgs& a_;
  const DeformConvParams& p_;
  OutputRows<T> output_;
  int64_t tile_, sampled_;  // positions: per tile of the GEMM; sampled at a time
  ChannelChunks chunks_;
  std::vector<std::vector<DepthStep>> steps_;  // per group; the same in all groups
  int64_t stride_ = 0;                         // of a row of columns
  std::vector<T> zeros_;
};

template <typename T, typename E>
Tensor forward(const DeformConvArgs& a, const Tensor& bias, bool channels_last) {
  const DeformConvParams& p = a.params;
  const std::vector<int64_t> sizes = {p.batch, p.out_channels, p.out_height, p.out_width};
  Tensor output =
      channels_last ? empty_strided(sizes, channels_last_strides(sizes), a.input) : empty_contiguous(sizes, a.input);
  if (p.positions() > 0)
    Forward<T, E>(a, {p, bias.numel() ? bias.in<T>() : nullptr, output.out<T>(), channels_last}).run();
  return output;
}

}  // namespace

Tensor deform_conv2d(const DeformConvArgs& args, const Tensor& bias, bool channels_last) {
  check_density(args);
  check_bias(bias, args.input, args.params);
  DCN_CHECK(is_contiguous(bias), "deform_conv2d: bias must be contiguous");
  return by_product_types(args.input, [&](auto value, auto element) {
    return forward<decltype(value), decltype(element)>(args, bias, channels_last);
  });
}

}  // namespace dcnseg_ops
