// Runs the complete CPU convolution on generated cases under the sanitizers and compares with plain loops in double:
// every dtype and memory format, several threads. Prints differences; returns 1 if there are any.
#include <cstdlib>
#include "cpu/conv/deform_conv2d.h"
#include "cpu/conv/sampling.h"
#include "cpu/gemm/microkernel.h"
#include "whole_case.h"

template <typename T>
constexpr int32_t dtype_of() {
  if (std::is_same_v<T, f16>) return kFloat16;
  return std::is_same_v<T, float> ? kFloat32 : std::is_same_v<T, double> ? kFloat64 : kBfloat16;
}

static std::vector<int64_t> contiguous(const std::vector<int64_t>& n) {
  std::vector<int64_t> strides(n.size(), 1);
  for (size_t i = n.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * n[i - 1];
  return strides;
}

// Strides of one of the memory formats of an argument.
static std::vector<int64_t> dense_strides(const std::vector<int64_t>& n) {
  return pick(0, 1) ? contiguous(n) : channels_last_strides(n);
}
static std::vector<int64_t> any_strides(const std::vector<int64_t>& n) {
  if (pick(0, 2)) return dense_strides(n);
  const int64_t row = n[3] + 2;  // a slice of a larger tensor, or batch innermost
  return pick(0, 1) ? std::vector<int64_t>{n[1] * n[2] * row, n[2] * row, row, 1}
                    : std::vector<int64_t>{1, n[0], n[0] * n[1] * n[3], n[0] * n[1]};
}

template <typename T>
static Tensor make(const std::vector<double>& values, const std::vector<int64_t>& n, const std::vector<int64_t>& s) {
  Tensor t = fake_tensor(n, s, dtype_of<T>());
  for_each(t, [&](int64_t i, int64_t at) { store_one(t.out<T>() + at, static_cast<AccOf<T>>(values[i])); });
  return t;
}

template <typename T>
static std::vector<double> values_of(const Tensor& t) {
  std::vector<double> values(static_cast<size_t>(t.numel()));
  if (t.numel() > 0)
    for_each(t, [&](int64_t i, int64_t at) { values[i] = static_cast<double>(load_one(t.in<T>() + at)); });
  return values;
}

template <typename T>
static std::vector<double> rounded(const std::vector<double>& values) {
  std::vector<double> out;
  for (double v : values) {
    T stored;
    store_one(&stored, static_cast<AccOf<T>>(v));
    out.push_back(static_cast<double>(load_one(&stored)));
  }
  return out;
}

template <typename T>
static bool check(Convolution c, double tolerance) {
  using A = AccOf<T>;
  const bool has_many_outputs = columns_of(c.p) < 1 << 15 && !pick(0, 3);  // otherwise the loops take long
  c.p.out_channels = c.p.groups * (has_many_outputs ? pick(31, 100) : pick(1, 6));
  const Whole<A> whole(c, rounded<T>);
  const DeformConvParams& p = whole.p;
  const int64_t planes = p.offset_groups * p.taps();
  const std::vector<int64_t> in_size = {p.batch, p.channels, p.height, p.width},
                             out_size = {p.batch, p.out_channels, p.out_height, p.out_width},
                             weight_size = {p.out_channels, p.group_channels(), p.kernel_h, p.kernel_w},
                             offset_size = {p.batch, 2 * planes, p.out_height, p.out_width},
                             mask_size = {p.batch, planes, p.out_height, p.out_width};
  const Tensor none = fake_tensor({0}, {1}, dtype_of<A>());
  const DeformConvArgs args{make<T>(whole.input, in_size, dense_strides(in_size)),
                            make<A>(c.offset, offset_size, any_strides(offset_size)),
                            whole.has_mask ? make<A>(c.mask, mask_size, any_strides(mask_size)) : none,
                            make<T>(whole.weight, weight_size, dense_strides(weight_size)), p};
  Tensor bias_tensor = fake_tensor({whole.has_bias ? p.out_channels : 0}, {1}, dtype_of<T>());
  for (int64_t o = 0; whole.has_bias && o < p.out_channels; ++o)
    store_one(bias_tensor.out<T>() + o, static_cast<A>(whole.bias[o]));
  fake_threads = static_cast<uint32_t>(pick(1, 3));
  const auto number = [](double v) { return v; };
  const Tensor ours = deform_conv2d(args, bias_tensor, pick(0, 1));
  if (!compare("output", values_of<T>(ours), whole.output, 30 * tolerance, number)) return false;

  const WantedGrads wanted = {pick(0, 3) > 0, pick(0, 3) > 0, whole.has_mask && pick(0, 3), pick(0, 3) > 0};
  const DeformConvGrads grads =
      deform_conv2d_backward(make<T>(whole.grad, out_size, any_strides(out_size)), args, wanted);
  const double loose = 100 * tolerance;
  return (!wanted.input || compare("grad_input", values_of<T>(grads.input), whole.e.input, loose, number)) &&
         (!wanted.offset || compare("grad_offset", values_of<A>(grads.offset), whole.e.offset, loose, number)) &&
         (!wanted.mask || compare("grad_mask", values_of<A>(grads.mask), whole.e.mask, loose, number)) &&
         (!wanted.weight || compare("grad_weight", values_of<T>(grads.weight), whole.grad_weight, loose, number));
}

// Indices of positions, pixels and channels above 2^31, in the last image of a batch that is not allocated: one offset
// is used for all positions.
static bool check_large_indices() {
  DeformConvParams p{};
  p.batch = 3, p.channels = 64, p.height = p.width = p.out_height = p.out_width = 30000;
  p.kernel_h = p.kernel_w = p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
  p.groups = p.offset_groups = p.out_channels = 1;
  const int64_t pixels = p.height * p.width, first = 2 * pixels + 29999 * p.width + 7;
  const float offset = 0;
  const Sampler<float> sampler{p, nullptr, p.channels, nullptr, 0, {&offset, 0, 0, 0, 0}, {}};
  const DepthStep step{0, 1, 0, p.channels, segments_of(p, 0, p.channels)};
  StepPlans<float> plans(false);
  plans.make(sampler, step, first, first + kBlock);
  const PixelRows<float> pixels_of(sampler, 0);
  bool right = true;
  for (int j = 0; j < kBlock; ++j)
    right = right && plans.plans[0].index[0][j] + plans.block.first_pixel[j] == first + j &&
            reinterpret_cast<intptr_t>(pixels_of.corners(plans.plans[0], plans.block.first_pixel[j], j).row[0]) ==
                (first + j) * p.channels * static_cast<intptr_t>(sizeof(float));
  Sampler<float> strided = sampler;  // offsets are addressed, not read
  strided.offset = {&offset, 18 * pixels, pixels, p.out_width, 1};
  start_block(strided, first, first + kBlock, plans.block);
  for (int j = 0; j < kBlock; ++j)
    right = right && plans.block.offset[j] == 2 * 18 * pixels + 29999 * p.out_width + 7 + j;
  if (!right) std::printf("an index beyond 2^31 is wrong\n");
  return right;
}

// Arguments: number of convolutions, of which those after the first 40 are small, and the seed.
int main(int count, char** arguments) {
  if (!check_large_indices()) return 1;
  const int cases = count > 1 ? std::atoi(arguments[1]) : 40;
  if (count > 2) generator.seed(static_cast<unsigned>(std::atoi(arguments[2])));
  for (int i = 0; i < cases; ++i) {
    const Convolution c = generate(1, i < 40 ? 1 << 18 : 1 << 14);
    if (check<double>(c, 1e-13) && check<float>(c, 2e-5) && check<bf16>(c, 2e-2) && check<f16>(c, 3e-3)) continue;
    const DeformConvParams& p = c.p;
    std::printf("convolution %d: %d channels in %d groups and %d offset groups, kernel %dx%d, %d positions\n", i,
                int(p.channels), int(p.groups), int(p.offset_groups), int(p.kernel_h), int(p.kernel_w),
                int(p.positions()));
    return 1;
  }
  return 0;
}
