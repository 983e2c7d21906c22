// Runs the source of the fused forward on host threads (tests/cuda_ops/emulator) on generated convolutions and
// compares with plain loops in double. The tolerance is the rounding of columns, output and, for TF32, weight. Prints
// differences; returns 1 if there are any.
#define DCN_EMULATE
#include <cstdlib>
#include "cuda/conv/fused_forward.cuh"
#include "oracle.h"

// Channels in vectors of `unit` elements, usually not a multiple of steps or tiles. Groups and offset groups divide
// the channels in different places.
static DeformConvParams pick_fused_sizes(int unit, int max_outputs) {
  DeformConvParams p = pick_sizes(unit);
  if (pick(0, 1)) p.channels *= pick(2, 5);
  p.out_channels = p.groups * (pick(0, 1) ? pick(1, max_outputs) : 8 * pick(1, max_outputs / 8));
  return p;
}

static Convolution generate_fused(int unit, int max_outputs) {
  Convolution c;
  DeformConvParams& p = c.p;
  do p = pick_fused_sizes(unit, max_outputs);
  while (columns_of(p) > 1 << 15 || p.taps() * (p.groups + p.offset_groups) > 45);  // the emulation takes long
  const int64_t planes = p.offset_groups * p.taps();
  c.input = values_with_odd_ones(p.batch * p.channels * p.height * p.width);
  for (int64_t i = 0; i < p.batch * 2 * planes * p.out_pixels(); ++i) c.offset.push_back(normal_or_odd(20));
  for (int64_t i = 0; i < p.batch * planes * p.out_pixels(); ++i) c.mask.push_back(pick(0, 99) ? normal() : NAN);
  c.grad_columns.assign(static_cast<size_t>(p.positions() * p.taps() * p.channels), 0);
  return c;
}

template <typename T>
static std::vector<T> cast(const std::vector<double>& values) {
  std::vector<T> result;
  for (const double v : values) result.push_back(Value<T>::from(static_cast<float>(v)));
  return result;
}
template <typename T>
static std::vector<double> doubles(const std::vector<T>& values) {
  std::vector<double> result;
  for (const T v : values) result.push_back(to_sum(v));
  return result;
}

// Maximum relative rounding error of an element; float32 becomes TF32.
template <typename T>
constexpr double kRounding = std::is_same_v<T, Bfloat16> ? 0x1p-8 : 0x1p-11;

template <typename T, typename Multiplier>
static bool check(const Convolution& c, bool has_mask, bool has_bias, bool channels_last, size_t available) {
  const DeformConvParams& p = c.p;
  const int64_t pixels = p.out_pixels(), group_channels = p.group_channels(), depth = p.depth();
  const auto normals = [](int64_t n) {
    std::vector<double> values(static_cast<size_t>(n));
    for (double& v : values) v = normal();
    return values;
  };
  const auto input = cast<T>(c.input), weight = cast<T>(normals(p.out_channels * depth)),
             bias = cast<T>(normals(p.out_channels));
  const auto offset = cast<float>(c.offset), mask = cast<float>(c.mask);
  std::vector<T> output(static_cast<size_t>(p.positions() * p.out_channels), Value<T>::from(12345));

  const FusedPlan plan = plan_fused<T, Multiplier>(static_cast<int32_t>(p.taps()), available);
  if (plan.stages == 0 || !fits_fused_numbers(p)) {
    std::printf("not served\n");
    return false;
  }
  FusedArguments<T> a = fused_arguments<T>(p, Multiplier::kOutputs, plan);
  a.input = input.data(), a.offset = offset.data(), a.mask = has_mask ? mask.data() : nullptr, a.weight = weight.data();
  a.bias = has_bias ? bias.data() : nullptr, a.output = output.data(), a.channels_last = channels_last;
  a.output_in_vectors = pick(0, 3) > 0;
  DCN_LAUNCH((fused_forward_kernel<T, Multiplier>), dim3(static_cast<unsigned>(fused_blocks(a))),
             dim3(kFusedThreads<Multiplier>), FusedShared<Multiplier::kOutputs>::bytes(plan.stages, plan.round_taps), 0,
             a);

  const std::vector<float> ones(mask.size(), 1);
  const Expected e = expect(
      p, doubles(input), offset, has_mask ? mask : ones, c.grad_columns,
      [&](int64_t b, int64_t channel, int64_t y, int64_t x) {
        return ((b * p.height + y) * p.width + x) * p.channels + channel;
      },
      [&](int64_t b, int64_t pixel, int64_t channel, int64_t t) {
        return ((b * pixels + pixel) * p.groups + channel / group_channels) * depth + t * group_channels +
               channel % group_channels;
      });
  for (int64_t position = 0; position < p.positions(); ++position)
    for (int64_t o = 0; o < p.out_channels; ++o) {
      const double* column = e.columns.data() + (position * p.groups + o / p.group_outputs()) * depth;
      double sum = has_bias ? to_sum(bias[o]) : 0.0, size = std::fabs(sum), squares = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const double product = column[k] * to_sum(weight[o * depth + k]);
        sum += product, size += std::fabs(product), squares += product * product;
      }
      const int64_t at = channels_last ? position * p.out_channels + o
                                       : (position / pixels * p.out_channels + o) * pixels + position % pixels;
      const double ours = to_sum(output[at]);
      // Rounding errors of many columns are independent: their sum grows with the root of the sum of squares. Four
      // times that has not been exceeded by chance, and is less than one missing product.
      const double roundings = std::fmin(size, 4 * std::sqrt(squares)) * (sizeof(T) == 4 ? 2 : 1) + std::fabs(sum);
      const double bound = kRounding<T> * roundings + 1e-6 * (1 + size);
      if (std::isfinite(sum) ? std::fabs(ours - sum) <= bound : !std::isfinite(ours)) continue;
      std::printf("output %d of position %d is %g, expected %g\n", int(o), int(position), ours, sum);
      return false;
    }
  return true;
}

template <typename T, template <typename, int> class Multiplier, int kOutputs>
static bool check_cases(const char* name, int cases) {
  for (int i = 0; i < cases; ++i) {
    const Convolution c = generate_fused(kPerVector<T>, kOutputs + kOutputs / 4);
    const bool has_mask = pick(0, 1), has_bias = pick(0, 2), channels_last = pick(0, 1);
    // Shared memory of a large device, or so little that only the samples of some taps fit.
    const size_t available = pick(0, 1) ? 227 << 10 : FusedShared<kOutputs>::bytes(2, pick(1, 4));
    if (check<T, Multiplier<T, kOutputs>>(c, has_mask, has_bias, channels_last, available)) continue;
    const DeformConvParams& p = c.p;
    std::printf("%s, case %d: %d channels in %d groups and %d offset groups, %d outputs, %d positions, kernel %dx%d\n",
                name, i, int(p.channels), int(p.groups), int(p.offset_groups), int(p.out_channels), int(p.positions()),
                int(p.kernel_h), int(p.kernel_w));
    return false;
  }
  return true;
}

#ifdef __SANITIZE_THREAD__
constexpr int kCases = 1;  // it is slow
// A fault would otherwise leave threads waiting for each other.
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }
#else
constexpr int kCases = 3;
#endif

int main(int count, char** arguments) {
  if (count > 1) generator.seed(static_cast<unsigned>(std::atoi(arguments[1])));
#ifdef DCN_FEW_KINDS  // for faults that affect all variants, because compiling takes longest
  return check_cases<Bfloat16, MmaSync, 64>("bfloat16, mma.sync, 64 outputs", kCases) &&
                 check_cases<Bfloat16, Wgmma, 64>("bfloat16, wgmma, 64 outputs", kCases)
             ? 0
             : 1;
#else
  return check_cases<Bfloat16, MmaSync, 64>("bfloat16, mma.sync, 64 outputs", kCases) &&
                 check_cases<Float16, MmaSync, 64>("float16, mma.sync, 64 outputs", kCases) &&
                 check_cases<float, MmaSync, 64>("tf32, mma.sync, 64 outputs", kCases) &&
                 check_cases<Bfloat16, MmaSync, 128>("bfloat16, mma.sync, 128 outputs", 1) &&
                 check_cases<Bfloat16, Wgmma, 64>("bfloat16, wgmma, 64 outputs", kCases) &&
                 check_cases<Float16, Wgmma, 128>("float16, wgmma, 128 outputs", 1) &&
                 check_cases<float, Wgmma, 128>("tf32, wgmma, 128 outputs", 1) &&
                 check_cases<Bfloat16, Wgmma, 256>("bfloat16, wgmma, 256 outputs", 1)
             ? 0
             : 1;
#endif
}
