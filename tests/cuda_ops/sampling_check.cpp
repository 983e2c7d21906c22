// Runs the sampling code of the CPU operator on generated convolutions, beside plain loops in
// double, under the sanitizers. Every buffer has exactly its size, so that a read or a write
// outside of it is an error. Prints what differs; returns 1 if anything does.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include "cpu/sampling.h"

using namespace dcnseg_ops;

static std::mt19937 generator(0);
static int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
static double normal() { return std::normal_distribution<double>()(generator); }

struct Convolution {
  DeformConvParams p{};
  std::vector<double> input, offset, mask, grad_columns;
};

static Convolution generate() {
  Convolution c;
  DeformConvParams& p = c.p;
  p.groups = pick(1, 2), p.offset_groups = pick(1, 3);
  p.batch = pick(1, 3), p.channels = p.groups * p.offset_groups * pick(1, 12);
  p.height = pick(1, 9), p.width = pick(1, 9), p.out_channels = p.groups;
  p.kernel_h = pick(1, 3), p.kernel_w = pick(1, 3);
  p.stride_h = pick(1, 2), p.stride_w = pick(1, 3), p.dilation_h = pick(1, 2), p.dilation_w = pick(1, 3);
  p.pad_h = pick(p.dilation_h * (p.kernel_h - 1) / 2 + 1, 5), p.pad_w = pick(p.dilation_w * (p.kernel_w - 1) / 2 + 1, 5);
  p.out_height = (p.height + 2 * p.pad_h - p.dilation_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_width = (p.width + 2 * p.pad_w - p.dilation_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
  const int64_t planes = p.offset_groups * p.taps();
  for (int64_t i = 0; i < p.batch * p.channels * p.height * p.width; ++i) c.input.push_back(normal());
  const double odd[] = {NAN, INFINITY, -INFINITY, 1e30, -1e30, 2147483647.0, -2147483649.0, -1.0, 0.0, 1.0};
  for (int64_t i = 0; i < p.batch * 2 * planes * p.out_pixels(); ++i) c.offset.push_back(pick(0, 9) ? 2 * normal() : odd[pick(0, 9)]);
  for (int64_t i = 0; i < p.batch * planes * p.out_pixels(); ++i) c.mask.push_back(normal());
  for (int64_t i = 0; i < p.positions() * p.taps() * p.channels; ++i) c.grad_columns.push_back(normal());
  return c;
}

template <typename T>
static std::vector<T> cast(const std::vector<double>& values) {
  std::vector<T> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) store_one(&out[i], static_cast<AccOf<T>>(values[i]));
  return out;
}

template <typename T>
static bool compare(const char* what, const std::vector<T>& ours, const std::vector<double>& expected, double tolerance) {
  for (size_t i = 0; i < ours.size(); ++i) {
    const double value = static_cast<double>(load_one(&ours[i]));
    if (std::isnan(value) && std::isnan(expected[i])) continue;
    if (std::fabs(value - expected[i]) <= tolerance * (1 + std::fabs(expected[i]))) continue;
    std::printf("%s[%zu] is %g, expected %g\n", what, i, value, expected[i]);
    return false;
  }
  return true;
}

template <typename T>
static bool check(const Convolution& c, double tolerance) {
  using A = AccOf<T>;
  const DeformConvParams& p = c.p;
  const auto input = cast<T>(c.input);
  const auto offset = cast<A>(c.offset), mask = cast<A>(c.mask);
  const auto grad_columns = cast<T>(c.grad_columns);
  const std::vector<T> zeros(static_cast<size_t>(p.channels), T{});
  const int64_t pixels = p.out_pixels(), planes = p.offset_groups * p.taps();
  Sampler<T> s{p, input.data(), zeros.data(), {offset.data(), 2 * planes * pixels, pixels, p.out_width, 1},
               {mask.data(), planes * pixels, pixels, p.out_width, 1}, {}};
  for (int64_t channel = 0; channel < p.channels; ++channel)  // the finest segments that there can be
    s.segments.push_back({channel, channel + 1, channel / p.group_channels(), channel / p.offset_group_channels()});
  if (p.groups == 1 && p.offset_groups == 1) s.segments = {{0, p.channels, 0, 0}};

  std::vector<T> columns(grad_columns.size());
  std::vector<A> grad_offset(offset.size()), grad_mask(mask.size()), grad_input(input.size()), waste(static_cast<size_t>(p.channels));
  const int64_t half = p.positions() / 2;  // as two threads would
  sample_columns(s, 0, p.positions(), 0, half, columns.data());
  sample_columns(s, 0, p.positions(), half, p.positions(), columns.data());
  const PositionGrads<T> grads{grad_offset.data(), grad_mask.data()};
  position_grads(s, 0, p.positions(), 0, half, grad_columns.data(), grads);
  position_grads(s, 0, p.positions(), half, p.positions(), grad_columns.data(), grads);
  scatter_columns(s, 0, p.positions(), 0, p.channels / 2, grad_columns.data(), grad_input.data(), waste.data());
  scatter_columns(s, 0, p.positions(), p.channels / 2, p.channels, grad_columns.data(), grad_input.data(), waste.data());

  std::vector<double> e_columns(columns.size()), e_offset(offset.size()), e_mask(mask.size()), e_input(input.size());
  for (int64_t position = 0; position < p.positions(); ++position)
    for (int64_t t = 0; t < p.taps(); ++t)
      for (int64_t channel = 0; channel < p.channels; ++channel) {
        const int64_t b = position / pixels, pixel = position % pixels, g = channel / p.offset_group_channels();
        const int64_t group = channel / p.group_channels(), first = channel % p.group_channels();
        const int64_t plane = (b * p.offset_groups + g) * p.taps() + t;
        const int64_t column = ((group * p.positions() + position) * p.taps() + t) * p.group_channels() + first;
        const double m = mask[plane * pixels + pixel], g_column = load_one(&grad_columns[column]);
        const double y = A(pixel / p.out_width * p.stride_h - p.pad_h + t / p.kernel_w * p.dilation_h) + offset[2 * plane * pixels + pixel];
        const double x = A(pixel % p.out_width * p.stride_w - p.pad_w + t % p.kernel_w * p.dilation_w) + offset[(2 * plane + 1) * pixels + pixel];
        const bool bad = !std::isfinite(y) || !std::isfinite(x);
        double value = bad ? NAN : 0, dy = bad ? NAN : 0, dx = bad ? NAN : 0;
        const double fy = std::floor(A(y)), fx = std::floor(A(x)), ly = A(y) - fy, lx = A(x) - fx;
        for (int corner = 0; corner < 4 && !bad; ++corner) {
          const double row = fy + corner / 2, col = fx + corner % 2;
          if (row < 0 || row >= p.height || col < 0 || col >= p.width) continue;
          const int64_t at = ((b * p.height + int64_t(row)) * p.width + int64_t(col)) * p.channels + channel;
          const double v = load_one(&input[at]), wy = corner / 2 ? ly : 1 - ly, wx = corner % 2 ? lx : 1 - lx;
          value += wy * wx * v;
          dy += (corner / 2 ? wx : -wx) * v;
          dx += (corner % 2 ? wy : -wy) * v;
          e_input[at] += m * wy * wx * g_column;
        }
        e_columns[column] = m * value;
        e_mask[plane * pixels + pixel] += g_column * value;
        e_offset[2 * plane * pixels + pixel] += m * g_column * dy;
        e_offset[(2 * plane + 1) * pixels + pixel] += m * g_column * dx;
      }
  return compare("columns", columns, e_columns, tolerance) && compare("grad_offset", grad_offset, e_offset, 10 * tolerance) &&
         compare("grad_mask", grad_mask, e_mask, 10 * tolerance) && compare("grad_input", grad_input, e_input, 10 * tolerance);
}

int main() {
  for (int i = 0; i < 60; ++i) {
    const Convolution c = generate();
    if (!check<double>(c, 1e-12) || !check<float>(c, 2e-4) || !check<bf16>(c, 1e-2)) {
      std::printf("convolution %d\n", i);
      return 1;
    }
  }
  return 0;
}
