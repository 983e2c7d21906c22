// Runs the complete CUDA convolution on the host, from the call by torch to the source of the kernels
// (tests/cuda_ops/emulator), on generated cases under the sanitizers, and compares with plain loops in double: every
// dtype and memory format. The fused kernel is replaced by plain loops (fused_check runs the real one). Prints
// differences; returns 1 if there are any.
#define DCN_EMULATE
#include "cuda/conv/deform_conv2d.cu"
#include "cuda/conv/deform_conv2d_backward.cu"
#include "cuda/ops_cuda.cu"
#include "fake_cuda.h"
#include "whole_case.h"

static bool fused_serves = false;
static int fused_calls = 0;

namespace dcnseg_ops {
void register_roi_operators(TorchLibraryHandle) {}

bool fused_forward_serves(const DeformConvParams&, const Tensor&, bool) { return fused_serves; }

template <typename T, typename A>
static void plain_forward(const DeformConvParams& p, const T* input, Positions<A> all, const T* weight, const T* bias,
                          bool channels_last, T* output) {
  const int64_t pixels = p.out_pixels();
  for (int64_t position = 0; position < p.positions(); ++position)
    for (int64_t o = 0; o < p.out_channels; ++o) {
      const int64_t b = position / pixels, pixel = position % pixels;
      A sum = bias ? to_sum(bias[o]) : A(0);
      for (int64_t t = 0; t < p.taps(); ++t)
        for (int64_t i = 0; i < p.group_channels(); ++i) {
          const int64_t channel = o / p.group_outputs() * p.group_channels() + i;
          const TapSample<A> s =
              locate_tap(p, positions_of_image(p, all, b), channel / p.offset_group_channels(), t, pixel);
          A weights[4];
          corner_weights(s.at.ly, s.at.lx, s.mask, weights);
          A column = 0;
          for (int k = 0; k < 4; ++k) {
            const int64_t at = (b * p.height * p.width + s.at.index[k]) * p.channels + channel;
            column += weights[k] * (s.at.index[k] == kOutside ? A(0) : to_sum(input[at]));
          }
          sum += column * to_sum(weight[(o * p.taps() + t) * p.group_channels() + i]);
        }
      output[channels_last ? position * p.out_channels + o : (b * p.out_channels + o) * pixels + pixel] =
          Value<T>::from(sum);
    }
}

void fused_forward(const DeformConvParams& p, const Tensor& input, const Tensor& offset, const Tensor& mask,
                   const Tensor& weight, const Tensor& bias, const Tensor& output, bool channels_last, cudaStream_t) {
  ++fused_calls;
  by_dtype(input, [&](auto value, auto sum) {
    using T = decltype(value);
    using A = decltype(sum);
    plain_forward<T, A>(p, input.in<T>(), {offset.in<A>(), mask.numel() ? mask.in<A>() : nullptr}, weight.in<T>(),
                        bias.numel() ? bias.in<T>() : nullptr, channels_last, output.out<T>());
  });
}
}  // namespace dcnseg_ops

template <typename T>
constexpr int32_t dtype_of() {
  if (std::is_same_v<T, __half>) return kFloat16;
  return std::is_same_v<T, float> ? kFloat32 : std::is_same_v<T, double> ? kFloat64 : kBfloat16;
}
template <typename T>
using SumOf = decltype(to_sum(T{}));

template <typename T>
static Tensor make(const std::vector<double>& values, const std::vector<int64_t>& sizes, bool channels_last) {
  const Tensor t = fake_tensor(sizes, dense_strides(sizes.data(), channels_last), dtype_of<T>());
  for_each(t, [&](int64_t i, int64_t at) { t.out<T>()[at] = Value<T>::from(static_cast<SumOf<T>>(values[i])); });
  return t;
}

template <typename T>
static std::vector<double> values_of(const Tensor& t) {
  std::vector<double> values(static_cast<size_t>(t.numel()));
  for_each(t, [&](int64_t i, int64_t at) { values[i] = static_cast<double>(to_sum(t.in<T>()[at])); });
  return values;
}

template <typename T>
static std::vector<double> rounded(const std::vector<double>& given) {
  std::vector<double> values = given;
  for (double& v : values) v = static_cast<double>(to_sum(Value<T>::from(static_cast<SumOf<T>>(v))));
  return values;
}

// The seven integers of the schemas.
static std::vector<StableIValue> numbers_of(const DeformConvParams& p) {
  std::vector<StableIValue> numbers;
  for (int64_t n : {p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w, int64_t(p.border)})
    numbers.push_back(static_cast<StableIValue>(n));
  return numbers;
}

static std::vector<Tensor> call(const char* name, const std::vector<Tensor>& tensors, const DeformConvParams& p,
                                const std::vector<bool>& flags, int results) {
  std::vector<StableIValue> stack;
  for (const Tensor& tensor : tensors) stack.push_back(from_tensor(tensor));
  for (StableIValue number : numbers_of(p)) stack.push_back(number);
  for (bool flag : flags) stack.push_back(flag);
  fake_operators.at(name)(stack.data(), tensors.size(), static_cast<uint64_t>(results));
  std::vector<Tensor> made;
  for (int i = 0; i < results; ++i) made.push_back(as_tensor(stack[static_cast<size_t>(i)]));
  return made;
}

template <typename T>
static bool check(Convolution c, double tolerance) {
  using A = SumOf<T>;
  c.p.out_channels = c.p.groups * (pick(0, 3) ? pick(1, 6) : pick(31, 40));
  const Whole<A> whole(c, rounded<T>);
  const DeformConvParams& p = whole.p;
  const int64_t planes = p.offset_groups * p.taps();
  const auto any = [] { return pick(0, 1) == 1; };
  const Tensor none = fake_tensor({0}, {1}, dtype_of<A>());
  const Tensor input = make<T>(whole.input, {p.batch, p.channels, p.height, p.width}, any());
  const Tensor offset = make<A>(c.offset, {p.batch, 2 * planes, p.out_height, p.out_width}, false);
  const Tensor mask = whole.has_mask ? make<A>(whole.mask, {p.batch, planes, p.out_height, p.out_width}, false) : none;
  const Tensor weight = make<T>(whole.weight, {p.out_channels, p.group_channels(), p.kernel_h, p.kernel_w}, any());
  const Tensor bias = fake_tensor({whole.has_bias ? p.out_channels : 0}, {1}, dtype_of<T>());
  for (int64_t o = 0; o < bias.numel(); ++o)
    bias.out<T>()[o] = Value<T>::from(static_cast<A>(whole.bias[static_cast<size_t>(o)]));
  const auto number = [](double v) { return v; };
  emu::l2_cache_bytes = pick(0, 1) ? 50 << 20 : 1 << 15;
  const bool channels_last = any();
  for (const bool fused : {false, true}) {
    fused_serves = fused;
    const int before = fused_calls;
    const Tensor ours =
        call("deform_conv2d", {input, offset, mask, weight, bias}, p, {channels_last, any(), true}, 1)[0];
    if (!has_strides(ours, dense_strides(ours.sizes(), channels_last)) || (fused_calls > before) != fused) {
      std::printf("the output has the wrong memory format, or the wrong kernel was used\n");
      return false;
    }
    if (!compare("output", values_of<T>(ours), whole.output, 30 * tolerance, number)) return false;
  }
  const std::vector<bool> wanted = {pick(0, 3) > 0, pick(0, 3) > 0, whole.has_mask && pick(0, 3), pick(0, 3) > 0};
  std::vector<bool> flags = wanted;
  flags.push_back(any());
  const Tensor grad = make<T>(whole.grad, {p.batch, p.out_channels, p.out_height, p.out_width}, any());
  const std::vector<Tensor> grads = call("deform_conv2d_backward", {grad, input, offset, mask, weight}, p, flags, 4);
  const double loose = 100 * tolerance;
  for (size_t i = 0; i < 4; ++i)
    if (!wanted[i] && grads[i].numel() != 0) return false;
  return (!wanted[0] || compare("grad_input", values_of<T>(grads[0]), whole.e.input, loose, number)) &&
         (!wanted[1] || compare("grad_offset", values_of<A>(grads[1]), whole.e.offset, loose, number)) &&
         (!wanted[2] || compare("grad_mask", values_of<A>(grads[2]), whole.e.mask, loose, number)) &&
         (!wanted[3] || compare("grad_weight", values_of<T>(grads[3]), whole.grad_weight, loose, number));
}

#ifndef DCN_LITTLE_MEMORY
// Division of large convolutions for an L2 cache of 50 MiB: complete, and with buffers below 64 MiB.
static bool check_cuts() {
  for (const int64_t channels : {64, 256, 512})
    for (const int64_t size : {33, 65, 128, 256})
      for (const int64_t bytes : {2, 4}) {
        DeformConvParams p{};
        p.batch = 8, p.channels = p.out_channels = channels, p.groups = p.offset_groups = 1;
        p.height = p.width = p.out_height = p.out_width = size, p.kernel_h = p.kernel_w = 3;
        if (size * size * channels > 128 * 128 * 256) continue;
        // A backward of contiguous tensors: copies of an image, sums of its gradient, rows of the output gradient.
        const BufferBytes buffers{size * size * channels * (bytes + 4), channels * (9 + 1) * bytes,
                                  channels * channels * 9 * (bytes + 4)};
        const Cut cut = cut_of(p, buffers, 50 << 20);
        int64_t images = 0, positions = 0;
        for_images(p, cut, [&](int64_t first, int64_t some) {
          images += first == images ? some : 0;
          for_tiles(p, cut, some, [&](int64_t, int64_t count) { positions += count; });
        });
        const int64_t all = cut.images * buffers.image + cut.positions * buffers.position + buffers.fixed;
        const bool whole = cut.positions % 128 == 0 || cut.positions == cut.images * p.out_pixels();
        if (images == p.batch && positions == p.positions() && all <= 64 << 20 && whole) continue;
        std::printf("%d channels of %d x %d: %d images, %d positions at a time, %d bytes\n", int(channels), int(size),
                    int(size), int(cut.images), int(cut.positions), int(all));
        return false;
      }
  return true;
}

#endif

#if defined(__SANITIZE_THREAD__) || defined(DCN_LITTLE_MEMORY)
constexpr int kCases = 4;  // it is slow
#else
constexpr int kCases = 8;
#endif

int main() {
  if (const char* error = dcnseg_register()) {
    std::printf("%s\n", error);
    return 1;
  }
#ifndef DCN_LITTLE_MEMORY
  if (!check_cuts()) return 1;
#endif
  for (int i = 0; i < kCases; ++i) {
    const int multiples[] = {1, 4, 8, 16};
    const Convolution c = generate(multiples[i % 4], 1 << 16, 2000);  // the emulation takes long
    if (!check<double>(c, 1e-13) || !check<float>(c, 2e-5) || !check<__nv_bfloat16>(c, 2e-2) ||
        !check<__half>(c, 3e-3)) {
      std::printf("convolution %d\n", i);
      return 1;
    }
  }
  return 0;
}
