// Runs the loops of the RoI operators on the CPU on generated boxes under the sanitizers and compares with plain loops
// in double. Every buffer has exactly its size. Prints differences; returns 1 if there are any.
#include "cpu/roi/roi_average_loops.h"
#include "cpu/roi/roi_max_loops.h"
#include "roi_oracle.h"

template <typename T>
static std::vector<T> cast(const std::vector<double>& values) {
  std::vector<T> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) store_one(&out[i], static_cast<AccOf<T>>(values[i]));
  return out;
}

template <typename T>
static double to_double(T v) {
  return static_cast<double>(load_one(&v));
}

template <typename T>
static std::vector<double> doubles(const std::vector<T>& values) {
  std::vector<double> out;
  for (const T& v : values) out.push_back(to_double(v));
  return out;
}

// The images of a case in either memory format.
struct Maps {
  const RoiCase& k;
  bool channels_last;

  int64_t pixels() const { return k.height * k.width; }
  // Converts [B, C, H, W] to this memory format, or back.
  template <typename T>
  std::vector<T> reorder(const std::vector<T>& from, bool back) const {
    std::vector<T> to(from.size());
    for (int64_t b = 0; b < k.batch; ++b)
      for (int64_t c = 0; c < k.channels(); ++c)
        for (int64_t i = 0; i < pixels(); ++i) {
          const int64_t plain = (b * k.channels() + c) * pixels() + i;
          const int64_t ours = channels_last ? (b * pixels() + i) * k.channels() + c : plain;
          to[back ? plain : ours] = from[back ? ours : plain];
        }
    return to;
  }
  // From channel c in steps of `step` channels. Without an image nothing is read.
  template <typename T>
  Pixels<T> image(T* data, int64_t b, int64_t c, int64_t step) const {
    const int64_t channel = channels_last ? 1 : pixels(), pixel = channels_last ? k.channels() : 1;
    return {b < 0 ? data : data + b * k.channels() * pixels() + c * channel, channel * step, pixel, k.width};
  }
};

static RoiShape shape_of(const RoiCase& k) {
  return {k.batch, k.channels(), k.height, k.width, k.boxes, k.kernel_h, k.kernel_w, k.group_h, k.group_w};
}

template <typename T>
struct Pooled {
  std::vector<T> output;
  std::vector<AccOf<T>> input, shift;

  explicit Pooled(const RoiCase& k) : output(k.outputs()), input(k.input.size()), shift(k.shift.size()) {}
};

// All windows of a source, by the vectorized loops if channels are contiguous. Gradients of the input are added in two
// bands of rows.
template <typename T, typename Source>
static Pooled<T> pool(const RoiCase& k, const Maps& maps, const Source& source, const std::vector<T>& input,
                      const std::vector<T>& grad) {
  using A = AccOf<T>;
  const RoiShape p = shape_of(k);
  const int64_t n = k.out_channels / source.classes(), middle = k.height / 2;
  Pooled<T> made(k);
  BoxPlan<A> plan;
  std::vector<Tap<A>> clipped;
  std::vector<T> means(n), grads(n);
  for (int64_t r = 0; r < k.boxes; ++r)
    for (int64_t kind = 0; kind < source.classes(); ++kind) {
      source.plan(r, kind, plan);
      for (int64_t bin = 0; bin < p.bins(); ++bin) {
        const Window<A> w = plan.window(bin);
        const int64_t channel = kind * n * p.cells() + p.cell_of(bin),
                      at = (r * k.out_channels + kind * n) * p.bins() + bin;
        const auto in = maps.image(input.data(), source.image(r), channel, p.cells());
        auto sums = maps.image(made.input.data(), source.image(r), channel, p.cells());
        const bool is_dense = in.channel == 1;
        for (int64_t i = 0; i < n; ++i) grads[i] = grad[at + i * p.bins()];
        if (is_dense)
          mean(in, w, n, means.data());
        else
          mean_strided(in, w, n, means.data(), 1);
        for (int64_t i = 0; i < n; ++i) made.output[at + i * p.bins()] = means[i];
        for (const auto& [row, end] : {std::pair<int64_t, int64_t>(0, middle), std::pair(middle, k.height)}) {
          const Window<A> band = clip_rows(w, row, end, clipped);
          if (is_dense)
            spread<T>(sums, band, n, grads.data());
          else
            spread_strided<T>(sums, band, n, grad.data() + at, p.bins());
          sums.data += (end - row) * k.width * sums.pixel;
        }
        if constexpr (std::is_same_v<Source, SampleSource<A>>) {
          if (!k.shifted) continue;
          const ShiftGrad<A> sum =
              is_dense ? slopes(in, w, n, grads.data()) : slopes_strided(in, w, n, grad.data() + at, p.bins());
          const int64_t x = source.shift_index(r, kind, bin);
          made.shift[x] += sum.x;
          made.shift[x + k.part_h * k.part_w] += sum.y;
        }
      }
    }
  return made;
}

template <typename T>
static bool check_mean(const RoiCase& k, const Maps& maps, const std::vector<T>& input, const std::vector<T>& grad,
                       double tolerance) {
  const ExpectedRois e = expect_mean(k);
  const Pooled<T> made = pool(k, maps, BinSource{k.bins.data(), k.kernel_h, k.kernel_w}, input, grad);
  const auto number = [](double v) { return v; };
  return compare("mean", doubles(made.output), e.output, tolerance, number) &&
         compare("mean's input", doubles(maps.reorder(made.input, true)), e.input, 10 * tolerance, number);
}

template <typename T>
static bool check_deform(const RoiCase& k, const Maps& maps, const std::vector<T>& input, const std::vector<T>& grad,
                         double tolerance) {
  using A = AccOf<T>;
  const std::vector<A> samples = cast<A>(k.samples), shift = cast<A>(k.shift);
  const ExpectedRois e = expect_deform<A>(k);
  const SampleSource<A> source{samples.data(), k.shifted ? shift.data() : nullptr, shape_of(k),
                               k.classes,      k.shifted ? k.part_h : k.kernel_h,  k.shifted ? k.part_w : k.kernel_w,
                               k.border};
  Pooled<T> made = pool(k, maps, source, input, grad);
  for (size_t i = 0; i < made.shift.size(); ++i)  // set by the operator: a part may have no bin
    if (source.image(int64_t(i) / (2 * k.classes * k.part_h * k.part_w)) < 0) made.shift[i] = A(NAN);
  const auto number = [](double v) { return v; };
  return compare("deformed", doubles(made.output), e.output, tolerance, number) &&
         compare("deformed's input", doubles(maps.reorder(made.input, true)), e.input, 10 * tolerance, number) &&
         compare("deformed's shift", doubles(made.shift), e.shift, 20 * tolerance, number);
}

template <typename T>
static bool check_max(const RoiCase& k, const Maps& maps, const std::vector<T>& input) {
  const ExpectedRois e = expect_max(k);
  const BinSource source{k.bins.data(), k.kernel_h, k.kernel_w};
  const int64_t n = k.channels(), bins = k.cells();
  std::vector<T> output(k.outputs()), values(n);
  std::vector<int32_t> argmax(k.outputs(), -1), indices(n);
  for (int64_t r = 0; r < k.boxes; ++r)
    for (int64_t bin = 0; bin < bins; ++bin) {
      if (source.image(r) < 0) continue;
      const auto in = maps.image(input.data(), source.image(r), 0, 1);
      if (in.channel == 1)
        max_dense(in, pixel_window(source, r, bin), n, values.data(), indices.data());
      else
        max_strided(in, pixel_window(source, r, bin), n, values.data(), indices.data(), 1);
      for (int64_t c = 0; c < n; ++c) output[(r * n + c) * bins + bin] = values[c];
      for (int64_t c = 0; c < n; ++c) argmax[(r * n + c) * bins + bin] = indices[c];
    }
  for (int64_t i = 0; i < k.outputs(); ++i)  // set by the operator
    if (source.image(i / (n * bins)) < 0) store_one(&output[i], AccOf<T>(NAN));
  return compare("max", output, e.output, 0, to_double<T>) &&
         compare("argmax", argmax, e.argmax, 0, [](int32_t v) { return double(v); });
}

template <typename T>
static bool check(RoiCase k, bool channels_last, double tolerance) {
  const Maps maps{k, channels_last};
  const std::vector<T> input = maps.reorder(cast<T>(k.input), false), grad = cast<T>(k.grad);
  k.input = doubles(cast<T>(k.input)), k.grad = doubles(grad);
  return check_mean(k, maps, input, grad, tolerance) && check_deform(k, maps, input, grad, tolerance) &&
         (k.group_h * k.group_w > 1 || check_max(k, maps, input));
}

int main() {
  for (int i = 0; i < 300; ++i) {
    RoiCase k = generate_rois(false);
    // Which of very many samples are on the map depends on rounding above 2^20; see samples_near().
    for (double& v : k.shift)
      if (std::isfinite(v) && std::fabs(v) > 1e6) v = std::copysign(1e25, v);
    for (const bool channels_last : {false, true})
      if (!check<double>(k, channels_last, 1e-11) || !check<float>(k, channels_last, 1e-4) ||
          !check<bf16>(k, channels_last, 1e-2) || !check<f16>(k, channels_last, 2e-3)) {
        std::printf("case %d\n", i);
        return 1;
      }
  }
  return 0;
}
