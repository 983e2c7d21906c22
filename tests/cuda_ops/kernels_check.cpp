// Runs the CUDA kernels' own source on host threads (cuda_ops/emu) on generated convolutions, beside
// plain loops in double, under the sanitizers. Prints what differs; returns 1 if anything does.
#define DCN_EMULATE
#include "cuda/deform_conv2d.cuh"
#include "oracle.h"

template <typename A>
static bool check(const Convolution& c, double tolerance) {
  const DeformConvParams& p = c.p;
  const auto cast = [](const std::vector<double>& values) { return std::vector<A>(values.begin(), values.end()); };
  const auto input = cast(c.input), offset = cast(c.offset), mask = cast(c.mask), grad_columns = cast(c.grad_columns);
  const int64_t pixels = p.out_pixels(), planes = p.offset_groups * p.taps() * pixels;
  const int64_t image_values = p.channels * p.height * p.width, image_columns = p.channels * p.taps() * pixels;
  std::vector<A> columns(grad_columns.size()), grad_offset(offset.size()), grad_mask(mask.size()),
      grad_input(input.size());
  const dim3 grid(3), block(32);  // fewer threads than numbers: each has several
  for (int64_t b = 0; b < p.batch; ++b)
    for (const Range range : {Range{0, pixels / 2}, Range{pixels / 2, pixels - pixels / 2}}) {
      if (range.count == 0) continue;
      const Positions<A> positions{offset.data() + b * 2 * planes, mask.data() + b * planes};
      const A* image = input.data() + b * image_values;
      // The columns of a tile are a matrix of their own: [C * T][count].
      std::vector<A> tile(static_cast<size_t>(p.channels * p.taps() * range.count)), tile_grads(tile.size());
      for (int64_t row = 0; row < p.channels * p.taps(); ++row)
        for (int64_t i = 0; i < range.count; ++i)
          tile_grads[row * range.count + i] = grad_columns[b * image_columns + row * pixels + range.first + i];
      const int64_t samples = sample_threads(p, range), places = position_threads(p, range);
      DCN_LAUNCH((sample_columns<A, A>), grid, block, 0, 0, p, image, positions, range, samples, tile.data());
      DCN_LAUNCH((position_grads<A, A>), grid, block, 0, 0, p, image, positions, tile_grads.data(), range, places,
                 grad_offset.data() + b * 2 * planes, grad_mask.data() + b * planes);
      DCN_LAUNCH((add_to_input<A, A>), grid, block, 0, 0, p, positions, tile_grads.data(), range, samples,
                 grad_input.data() + b * image_values);
      for (int64_t row = 0; row < p.channels * p.taps(); ++row)
        for (int64_t i = 0; i < range.count; ++i)
          columns[b * image_columns + row * pixels + range.first + i] = tile[row * range.count + i];
    }
  const auto doubles = [](const std::vector<A>& values) { return std::vector<double>(values.begin(), values.end()); };
  const Expected e = expect(
      p, doubles(input), offset, mask, doubles(grad_columns),
      [&](int64_t b, int64_t channel, int64_t y, int64_t x) {
        return ((b * p.channels + channel) * p.height + y) * p.width + x;
      },
      [&](int64_t b, int64_t pixel, int64_t channel, int64_t t) {
        return b * image_columns + (channel * p.taps() + t) * pixels + pixel;
      });
  const auto number = [](A v) { return static_cast<double>(v); };
  return compare("columns", columns, e.columns, tolerance, number) &&
         compare("grad_offset", grad_offset, e.offset, 10 * tolerance, number) &&
         compare("grad_mask", grad_mask, e.mask, 10 * tolerance, number) &&
         compare("grad_input", grad_input, e.input, 10 * tolerance, number);
}

#ifdef __SANITIZE_THREAD__
constexpr int kCases = 4;  // it is slow
#else
constexpr int kCases = 16;
#endif

int main() {
  emu::blocks_overlap = true;  // no kernel here has shared memory
  for (int i = 0; i < kCases; ++i) {
    Convolution c = generate();
    if (!check<double>(c, 1e-12) || !check<float>(c, 2e-4)) {
      std::printf("convolution %d\n", i);
      return 1;
    }
  }
  const float bias[2] = {1, 2};
  float output[6] = {0, 0, 0, 10, 10, 10}, sums[6] = {1, 1, 1, 1, 1, 1};
  DCN_LAUNCH((add_bias<float>), dim3(1), dim3(4), 0, 0, bias, int64_t(3), int64_t(6), output);
  DCN_LAUNCH((add_values<float, float>), dim3(1), dim3(4), 0, 0, output, int64_t(6), sums);
  DCN_LAUNCH((round_values<float, float>), dim3(1), dim3(4), 0, 0, sums, int64_t(6), output);
  return output[2] == 2 && output[5] == 13 ? 0 : 1;
}
