// The bilinear mathematics of the operators, for the CPU loops, the CUDA kernels and the tests.
//
// A position (y, x) in pixels lies between four pixels, its corners, numbered 00, 01, 10, 11 by
// (row, column). Corners outside the map read as zero. The derivative at an integer position is
// the right one, as floor() chooses the corners.
//
// Traps: a NaN or infinite position has no corner inside the map and NaN as its fractions, so
// that it gives NaN and nothing is read; the fractions poison each other, so that both
// derivatives are NaN.
#pragma once
#include <math.h>
#include <cstdint>
#include "hd.h"
namespace dcnseg_ops {

constexpr int32_t kOutside = -1;  // index of a corner outside the map

DCN_HD float floor_of(float v) { return floorf(v); }
DCN_HD double floor_of(double v) { return floor(v); }

template <typename acc_t>
struct Bilinear {
  int32_t index[4];  // row * width + column of each corner, or kOutside
  acc_t ly, lx;      // fractions: 0 at the first row or column, towards 1 at the second
};

// To an integer in [-2, size]: beyond that range every corner is outside anyway. NaN gives -2.
template <typename acc_t>
DCN_HD int32_t clamp_to_map(acc_t v, int32_t size) {
  v = v > acc_t(-2) ? v : acc_t(-2);
  v = v < acc_t(size) ? v : acc_t(size);
  return static_cast<int32_t>(v);
}

template <typename acc_t>
DCN_HD Bilinear<acc_t> locate(acc_t y, acc_t x, int32_t height, int32_t width) {
  const acc_t fy = floor_of(y), fx = floor_of(x);
  const int32_t row = clamp_to_map(fy, height), column = clamp_to_map(fx, width);
  // 1 or 0, joined with & and not &&: a loop over positions then has no branch and vectorises.
  const int32_t top = (row >= 0) & (row < height), bottom = (row >= -1) & (row < height - 1);
  const int32_t left = (column >= 0) & (column < width), right = (column >= -1) & (column < width - 1);
  const int32_t first = row * width + column;
  Bilinear<acc_t> s;
  s.index[0] = top & left ? first : kOutside;
  s.index[1] = top & right ? first + 1 : kOutside;
  s.index[2] = bottom & left ? first + width : kOutside;
  s.index[3] = bottom & right ? first + width + 1 : kOutside;
  s.ly = y - fy;
  s.lx = x - fx;
  const acc_t poison = (s.ly - s.ly) + (s.lx - s.lx);  // 0, or NaN where either is not finite
  s.ly += poison;
  s.lx += poison;
  return s;
}

template <typename acc_t>
DCN_HD void corner_weights(acc_t ly, acc_t lx, acc_t mask, acc_t weight[4]) {
  const acc_t hy = acc_t(1) - ly, hx = acc_t(1) - lx;
  weight[0] = hy * hx * mask;
  weight[1] = hy * lx * mask;
  weight[2] = ly * hx * mask;
  weight[3] = ly * lx * mask;
}

// Derivatives of a loss by y, x and mask, where dot[k] is the sum over the channels of
// (gradient of the column) * (value of corner k).
template <typename acc_t>
DCN_HD void position_gradient(const acc_t dot[4], acc_t ly, acc_t lx, acc_t mask, acc_t* grad_y, acc_t* grad_x,
                              acc_t* grad_mask) {
  const acc_t hy = acc_t(1) - ly, hx = acc_t(1) - lx;
  *grad_y = mask * (hx * (dot[2] - dot[0]) + lx * (dot[3] - dot[1]));
  *grad_x = mask * (hy * (dot[1] - dot[0]) + ly * (dot[3] - dot[2]));
  *grad_mask = hy * (hx * dot[0] + lx * dot[1]) + ly * (hx * dot[2] + lx * dot[3]);
}

}  // namespace dcnseg_ops
