// The bilinear mathematics of the operators, for the CPU loops, the CUDA kernels and the tests.
//
// A position (y, x) in pixels lies between four pixels, its corners, numbered 00, 01, 10, 11 by
// (row, column). Corners outside the map read as zero. The derivative at an integer position is
// the right one, as floor() chooses the corners.
//
// What lies at the edge of the map is a matter of convention, the Border: `zero` fades to zero over
// one pixel, as if the map went on with zeros; the others are valid up to a limit, are zero beyond
// it and replicate the edge in between, where the derivative across the edge is zero.
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

// The numbers cross from Python (dcnseg/ops): do not change them.
enum class Border : int32_t {
  zero = 0,   // Dai et al. eq. 3, torchvision's and mmcv's deform_conv2d
  mmcv = 1,   // valid where -1 <= v <= size
  mxnet = 2,  // valid where -0.5 <= v <= size - 0.5
  dcnv1 = 3   // valid where 0 <= v < size: the published code of 2017
};

// Whether coordinate v lies where a border reads something. NaN does not.
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
  // 1 or 0, joined with & and not &&: a loop over positions then has no branch and vectorizes.
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

// As `locate`, for a border that replicates the edge.
template <typename acc_t>
DCN_HD Bilinear<acc_t> locate_clamped(Border border, acc_t y, acc_t x, int32_t height, int32_t width) {
  const bool valid = is_valid(border, y, height) && is_valid(border, x, width);
  const acc_t poison = acc_t(0) * y + acc_t(0) * x;  // 0, or NaN where either is not finite
  const acc_t last_y = acc_t(height - 1), last_x = acc_t(width - 1);
  const acc_t cy = y > acc_t(0) ? (y < last_y ? y : last_y) : acc_t(0);  // NaN gives 0
  const acc_t cx = x > acc_t(0) ? (x < last_x ? x : last_x) : acc_t(0);
  const int32_t row = static_cast<int32_t>(cy), column = static_cast<int32_t>(cx), first = row * width + column;
  // Where the edge is replicated both corners are one pixel, so that their difference, the
  // derivative, is zero.
  const int32_t down = y >= acc_t(0) && row < height - 1 ? width : 0;
  const int32_t right = x >= acc_t(0) && column < width - 1 ? 1 : 0;
  Bilinear<acc_t> s;
  s.index[0] = valid ? first : kOutside;
  s.index[1] = valid ? first + right : kOutside;
  s.index[2] = valid ? first + down : kOutside;
  s.index[3] = valid ? first + down + right : kOutside;
  s.ly = cy - static_cast<acc_t>(row) + poison;
  s.lx = cx - static_cast<acc_t>(column) + poison;
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
