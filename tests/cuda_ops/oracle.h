// Generated convolutions, and the formula as plain loops in double, for the checks beside this file.
#pragma once
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>
#include "bilinear.h"
#include "deform_conv_params.h"

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
  p.batch = pick(1, 3), p.channels = p.groups * p.offset_groups * (pick(0, 5) ? pick(1, 12) : pick(33, 36));
  p.height = pick(1, 9), p.width = pick(1, 9), p.out_channels = p.groups;
  p.kernel_h = pick(1, 3), p.kernel_w = pick(1, 3);
  p.stride_h = pick(1, 2), p.stride_w = pick(1, 3), p.dilation_h = pick(1, 2), p.dilation_w = pick(1, 3);
  p.pad_h = pick(p.dilation_h * (p.kernel_h - 1) / 2 + 1, 5),
  p.pad_w = pick(p.dilation_w * (p.kernel_w - 1) / 2 + 1, 5);
  p.out_height = (p.height + 2 * p.pad_h - p.dilation_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_width = (p.width + 2 * p.pad_w - p.dilation_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
  const int64_t planes = p.offset_groups * p.taps();
  for (int64_t i = 0; i < p.batch * p.channels * p.height * p.width; ++i) c.input.push_back(normal());
  const double odd[] = {NAN, INFINITY, -INFINITY, 1e30, -1e30, 2147483647.0, -2147483649.0, -1.0, 0.0, 1.0};
  for (int64_t i = 0; i < p.batch * 2 * planes * p.out_pixels(); ++i)
    c.offset.push_back(pick(0, 9) ? 2 * normal() : odd[pick(0, 9)]);
  for (int64_t i = 0; i < p.batch * planes * p.out_pixels(); ++i) c.mask.push_back(normal());
  for (int64_t i = 0; i < p.positions() * p.taps() * p.channels; ++i) c.grad_columns.push_back(normal());
  return c;
}

// `number` turns one of ours into a double.
template <typename T, typename F>
static bool compare(const char* what, const std::vector<T>& ours, const std::vector<double>& expected, double tolerance,
                    F number) {
  for (size_t i = 0; i < ours.size(); ++i) {
    const double value = number(ours[i]);
    if (std::isnan(value) && std::isnan(expected[i])) continue;
    if (std::fabs(value - expected[i]) <= tolerance * (1 + std::fabs(expected[i]))) continue;
    std::printf("%s[%zu] is %g, expected %g\n", what, i, value, expected[i]);
    return false;
  }
  return true;
}

// What the operator must give. Values come rounded to its type; positions are computed in A, as it
// does. `input_at(b, c, y, x)` and `column_at(b, pixel, c, t)` say where it keeps them.
struct Expected {
  std::vector<double> columns, offset, mask, input;
};

template <typename A, typename I, typename C>
static Expected expect(const DeformConvParams& p, const std::vector<double>& input, const std::vector<A>& offset,
                       const std::vector<A>& mask, const std::vector<double>& grad_columns, I input_at, C column_at) {
  Expected e{std::vector<double>(grad_columns.size()), std::vector<double>(offset.size()),
             std::vector<double>(mask.size()), std::vector<double>(input.size())};
  const int64_t pixels = p.out_pixels();
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t pixel = 0; pixel < pixels; ++pixel)
      for (int64_t t = 0; t < p.taps(); ++t)
        for (int64_t c = 0; c < p.channels; ++c) {
          const int64_t g = c / p.offset_group_channels(), column = column_at(b, pixel, c, t);
          const int64_t plane = (b * p.offset_groups + g) * p.taps() + t;
          const double m = mask[plane * pixels + pixel], g_column = grad_columns[column];
          const A y = A(pixel / p.out_width * p.stride_h - p.pad_h + t / p.kernel_w * p.dilation_h) +
                      offset[2 * plane * pixels + pixel];
          const A x = A(pixel % p.out_width * p.stride_w - p.pad_w + t % p.kernel_w * p.dilation_w) +
                      offset[(2 * plane + 1) * pixels + pixel];
          const bool bad = !std::isfinite(y) || !std::isfinite(x);
          double value = bad ? NAN : 0, dy = bad ? NAN : 0, dx = bad ? NAN : 0;
          const double fy = std::floor(y), fx = std::floor(x), ly = y - fy, lx = x - fx;
          for (int corner = 0; corner < 4 && !bad; ++corner) {
            const double row = fy + corner / 2, col = fx + corner % 2;
            if (row < 0 || row >= p.height || col < 0 || col >= p.width) continue;
            const int64_t at = input_at(b, c, int64_t(row), int64_t(col));
            const double v = input[at], wy = corner / 2 ? ly : 1 - ly, wx = corner % 2 ? lx : 1 - lx;
            value += wy * wx * v;
            dy += (corner / 2 ? wx : -wx) * v;
            dx += (corner % 2 ? wy : -wy) * v;
            e.input[at] += m * wy * wx * g_column;
          }
          e.columns[column] = m * value;
          e.mask[plane * pixels + pixel] += g_column * value;
          e.offset[2 * plane * pixels + pixel] += m * g_column * dy;
          e.offset[(2 * plane + 1) * pixels + pixel] += m * g_column * dx;
        }
  return e;
}
