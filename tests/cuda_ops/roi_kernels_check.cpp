// Runs the CUDA kernels of the RoI operators on host threads (tests/cuda_ops/emulator) on generated poolings under the
// sanitizers and compares with plain loops in double. Every buffer has exactly its size. Prints differences; returns 1
// if there are any.
#define DCN_EMULATE
#include "cuda/roi/deform_roi_pool.cuh"
#include "cuda/roi/roi_pool.cuh"
#include "half_type.h"
#include "roi_oracle.h"

// Converts elements from the order [N, C, pixels] to that of a layout.
template <typename T, typename S>
static std::vector<T> laid_out(const std::vector<S>& values, const Layout& layout, int64_t channels, int64_t pixels) {
  std::vector<T> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t pixel = int64_t(i) % pixels, c = int64_t(i) / pixels % channels, n = int64_t(i) / pixels / channels;
    out[layout.at(n, c, pixel)] = convert<T>(values[i]);
  }
  return out;
}

template <typename T>
struct Check {
  using A = SumOf<T>;
  RoiCase c;  // its values are rounded to T
  double tolerance;
  RoiParams p{};
  int64_t pixels, bins;
  std::vector<T> input, grad;

  Check(RoiCase generated, bool input_last, bool output_last, double tolerance_)
      : c(std::move(generated)), tolerance(tolerance_), pixels(c.height * c.width), bins(c.cells()) {
    for (double& v : c.input) v = double(to_sum(convert<T>(v)));
    for (double& v : c.grad) v = double(to_sum(convert<T>(v)));
    for (double& v : c.samples) v = double(A(v));
    for (double& v : c.shift) v = double(A(v));
    p.batch = c.batch, p.height = int32_t(c.height), p.width = int32_t(c.width);
    p.boxes = c.boxes, p.out_channels = c.out_channels, p.kernel_h = c.kernel_h, p.kernel_w = c.kernel_w;
    p.group_h = c.group_h, p.group_w = c.group_w, p.channels_last = output_last;
    p.input = dense_layout(c.channels(), pixels, input_last);
    p.output = dense_layout(c.out_channels, bins, output_last);
    input = laid_out<T>(c.input, p.input, c.channels(), pixels);
    grad = laid_out<T>(c.grad, p.output, c.out_channels, bins);
  }

  template <typename V>
  bool same_output(const char* what, const std::vector<V>& ours, const std::vector<double>& expected, double allowed) {
    return compare(what, ours, laid_out<double>(expected, p.output, c.out_channels, bins), allowed,
                   [](V v) { return double(to_number(v)); });
  }
  bool same_input(const char* what, const std::vector<A>& ours, const std::vector<double>& expected) {
    return compare(what, ours, laid_out<double>(expected, p.input, c.channels(), pixels), 10 * sum_tolerance(),
                   [](A v) { return double(v); });
  }
  double sum_tolerance() const { return sizeof(A) == 8 ? 1e-12 : 2e-4; }

  bool max() {  // for the case without groups, whose channels are those of the output
    std::vector<T> output(c.outputs());
    std::vector<int32_t> argmax(c.outputs());
    std::vector<A> grad_input(c.input.size());
    DCN_LAUNCH((roi_max_forward<T, A>), dim3(3), dim3(8), 0, 0, p, input.data(), c.bins.data(), output.data(),
               argmax.data());
    const ExpectedRois e = expect_max(c);
    const bool forward = same_output("max", output, e.output, 0) && same_output("argmax", argmax, e.argmax, 0);
    DCN_LAUNCH((roi_max_backward<T, A>), dim3(3), dim3(8), 0, 0, p, grad.data(), c.bins.data(), argmax.data(),
               grad_input.data());
    if (!forward || !same_input("max: grad_input", grad_input, e.input)) return false;
    // An absent argmax must not be written to.
    for (size_t i = 0; i < argmax.size(); ++i)
      argmax[i] = i % 3 == 0 ? INT32_MAX : i % 3 == 1 ? INT32_MIN : int32_t(pixels);
    std::fill(grad_input.begin(), grad_input.end(), A(0));
    DCN_LAUNCH((roi_max_backward<T, A>), dim3(3), dim3(8), 0, 0, p, grad.data(), c.bins.data(), argmax.data(),
               grad_input.data());
    return same_input("max: wild argmax", grad_input, std::vector<double>(grad_input.size()));
  }

  bool mean() {
    std::vector<T> output(c.outputs());
    std::vector<A> grad_input(c.input.size());
    DCN_LAUNCH((roi_mean_forward<T, A>), dim3(3), dim3(8), 0, 0, p, input.data(), c.bins.data(), output.data());
    DCN_LAUNCH((roi_mean_backward<T, A>), dim3(3), dim3(8), 0, 0, p, grad.data(), c.bins.data(), grad_input.data());
    const ExpectedRois e = expect_mean(c);
    return same_output("mean", output, e.output, tolerance) && same_input("mean: grad_input", grad_input, e.input);
  }

  bool deform() {
    const std::vector<A> samples(c.samples.begin(), c.samples.end()), shift(c.shift.begin(), c.shift.end());
    const DeformRoiParams d{p, c.classes, c.part_h, c.part_w, c.border};
    const RoiPositions<A> positions{samples.data(), c.shifted ? shift.data() : nullptr};
    std::vector<T> output(c.outputs());
    std::vector<A> grad_input(c.input.size()), grad_shift(shift.size());
    const int64_t n = deform_roi_threads(d), shifts = shift_positions(d);
    DCN_LAUNCH((deform_roi_forward<T, A>), dim3(3), dim3(8), 0, 0, d, input.data(), positions, n, output.data());
    DCN_LAUNCH((deform_roi_input_grads<T, A>), dim3(3), dim3(8), 0, 0, d, grad.data(), positions, n, grad_input.data());
    if (c.shifted)
      DCN_LAUNCH((deform_roi_shift_grads<T, A>), dim3(2), dim3(64), 0, 0, d, grad.data(), input.data(), positions,
                 shifts, grad_shift.data());
    const ExpectedRois e = expect_deform<A>(c);
    return same_output("deform", output, e.output, tolerance) &&
           same_input("deform: grad_input", grad_input, e.input) &&
           compare("deform: grad_shift", grad_shift, e.shift, 100 * sum_tolerance(), [](A v) { return double(v); });
  }
};

template <typename T>
static bool check(const RoiCase& c, double tolerance) {
  const bool input_last = pick(0, 1), output_last = pick(0, 1);
  if (!Check<T>(c, input_last, output_last, tolerance).mean()) return false;
  if (!Check<T>(c, input_last, output_last, tolerance).deform()) return false;
  return c.group_h * c.group_w > 1 || Check<T>(c, input_last, output_last, tolerance).max();
}

#ifdef __SANITIZE_THREAD__
constexpr int kCases = 10;  // it is slow
#else
constexpr int kCases = 60;
#endif

int main() {
  emu::blocks_overlap = true;  // no kernel here uses shared memory
  for (int i = 0; i < kCases; ++i) {
    const RoiCase c = generate_rois(true);
    if (!check<double>(c, 1e-12) || !check<float>(c, 2e-4) || !check<Half>(c, 1e-2)) {
      std::printf("pooling %d\n", i);
      return 1;
    }
  }
  return 0;
}
