// Bilinear interpolation of the operators, shared by the CPU loops, the CUDA kernels and the tests.
//
// A position (y, x) in pixels is between four pixels, its corners, which are numbered 00, 01, 10, 11 by (row, column).
// Corners outside the map read as zero. The derivative at an integer position is the right-hand one, because floor()
// selects the corners.
//
// Border defines the values near and outside the border of the map. `zero`: the map is surrounded by zeros, with which
// samples within one pixel of the border are interpolated. The other borders replicate the edge up to a limit and are
// zero outside it; where the edge is replicated, the derivative across it is zero.
//
// Pitfalls: a NaN or infinite position has no corner inside the map and NaN fractions, so that the result is NaN and
// nothing is read. Each fraction is NaN if the other one is, so that both derivatives are NaN.
#pragma once
#include <math.h>
#include <cstdint>
#include "hd.h"
namespace dcnseg_ops {

constexpr int32_t kOutside = -1;  // index of a corner outside the map

DCN_HD float floor_of(float v) { return floorf(v); }
DCN_HD double floor_of(double v) { return floor(v); }

// The values are shared with Python (dcnseg/ops) and must not change.
enum class Border : int32_t {
  zero = 0,   // Dai et al. eq. 3, torchvision's and mmcv's deform_conv2d
  mmcv = 1,   // valid where -1 <= v <= size
  mxnet = 2,  // valid where -0.5 <= v <= size - 0.5
  dcnv1 = 3   // valid where 0 <= v < size: the published code of 2017
};

// Whether coordinate v is within the limits of a border. False for NaN.
template <typename acc_t>
DCN_HD bool is_valid(Border border, acc_t v, int32_t size) {
  if (border == Border::mmcv) return v >= acc_t(-1) && v <= acc_t(size);
  if (border == Border::mxnet) return v >= acc_t(-0.5) && v <= acc_t(size) - acc_t(0.5);
  if (border == Border::dcnv1) return v >= acc_t(0) && v < acc_t(size);
  return v > acc_t(-1) && v < acc_t(size);
}

template <typename acc_t>
struct Bilinear {
  int32_t index[4];  // row * width + column of each corner, or kOutside
  acc_t ly, lx;      // fractions: 0 at the first row or column, 1 at the second
};

// Converts to an integer in [-2, size]; outside that range all corners are outside the map. NaN gives -2.
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
  // 1 or 0, combined with & instead of &&, so that loops over positions have no branch and vectorize.
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
  const acc_t zero_or_nan = (s.ly - s.ly) + (s.lx - s.lx);  // 0, or NaN if either is not finite
  s.ly += zero_or_nan;
  s.lx += zero_or_nan;
  return s;
}

// Same as `locate`, for a border that replicates the edge.
template <typename acc_t>
DCN_HD Bilinear<acc_t> locate_clamped(Border border, acc_t y, acc_t x, int32_t height, int32_t width) {
  const bool valid = is_valid(border, y, height) && is_valid(border, x, width);
  const acc_t zero_or_nan = acc_t(0) * y + acc_t(0) * x;  // 0, or NaN if either is not finite
  const acc_t last_y = acc_t(height - 1), last_x = acc_t(width - 1);
  const acc_t cy = y > acc_t(0) ? (y < last_y ? y : last_y) : acc_t(0);  // NaN gives 0
  const acc_t cx = x > acc_t(0) ? (x < last_x ? x : last_x) : acc_t(0);
  const int32_t row = static_cast<int32_t>(cy), column = static_cast<int32_t>(cx), first = row * width + column;
  // Where the edge is replicated, both corners are the same pixel, so that their difference, the derivative, is zero.
  const int32_t down = y >= acc_t(0) && row < height - 1 ? width : 0;
  const int32_t right = x >= acc_t(0) && column < width - 1 ? 1 : 0;
  Bilinear<acc_t> s;
  s.index[0] = valid ? first : kOutside;
  s.index[1] = valid ? first + right : kOutside;
  s.index[2] = valid ? first + down : kOutside;
  s.index[3] = valid ? first + down + right : kOutside;
  s.ly = cy - static_cast<acc_t>(row) + zero_or_nan;
  s.lx = cx - static_cast<acc_t>(column) + zero_or_nan;
  return s;
}

template <typename acc_t>
DCN_HD Bilinear<acc_t> locate(Border border, acc_t y, acc_t x, int32_t height, int32_t width) {
  return border == Border::zero ? locate(y, x, height, width) : locate_clamped(border, y, x, height, width);
}

template <typename acc_t>
DCN_HD void corner_weights(acc_t ly, acc_t lx, acc_t mask, acc_t weight[4]) {
  const acc_t hy = acc_t(1) - ly, hx = acc_t(1) - lx;
  weight[0] = hy * hx * mask;
  weight[1] = hy * lx * mask;
  weight[2] = ly * hx * mask;
  weight[3] = ly * lx * mask;
}

// Derivatives of a loss with respect to y, x and mask. dot[k] is the sum over the channels of (gradient of the column)
// * (value of corner k).
template <typename acc_t>
DCN_HD void position_gradient(const acc_t dot[4], acc_t ly, acc_t lx, acc_t mask, acc_t* grad_y, acc_t* grad_x,
                              acc_t* grad_mask) {
  const acc_t hy = acc_t(1) - ly, hx = acc_t(1) - lx;
  *grad_y = mask * (hx * (dot[2] - dot[0]) + lx * (dot[3] - dot[1]));
  *grad_x = mask * (hy * (dot[1] - dot[0]) + ly * (dot[3] - dot[2]));
  *grad_mask = hy * (hx * dot[0] + lx * dot[1]) + ly * (hx * dot[2] + lx * dot[3]);
}

}  // namespace dcnseg_ops
