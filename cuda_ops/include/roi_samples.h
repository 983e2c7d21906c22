// Sample positions of a RoI bin, shared by the CPU loops, the CUDA kernels and the tests.
//
// Along an axis, sample i of a bin is at (first + i * step) + shift. Every operation is rounded separately: a fused
// multiply-add could move a sample across the limit of a border, and compilers do not contract consistently.
//
// The number of samples may be huge, because a box may be 1e30 pixels wide; `valid_samples` finds the samples that
// read a pixel without visiting the others.
#pragma once
#include <cstdint>
#include "bilinear.h"
#include "hd.h"
namespace dcnseg_ops {

#ifdef __CUDA_ARCH__
DCN_HD float rounded_product(float a, float b) { return __fmul_rn(a, b); }
DCN_HD double rounded_product(double a, double b) { return __dmul_rn(a, b); }
DCN_HD float rounded_sum(float a, float b) { return __fadd_rn(a, b); }
DCN_HD double rounded_sum(double a, double b) { return __dadd_rn(a, b); }
#else
// `volatile`, because GCC contracts through anything weaker when it vectorizes.
template <typename acc_t>
DCN_HD acc_t rounded_product(acc_t a, acc_t b) {
  volatile acc_t product = a * b;
  return product;
}
template <typename acc_t>
DCN_HD acc_t rounded_sum(acc_t a, acc_t b) {
  return a + b;
}
#endif

// The samples of one bin along one axis. `count` is an integer of any magnitude.
template <typename acc_t>
struct SampleAxis {
  acc_t first, step, count, shift;

  DCN_HD acc_t at(int64_t i) const {
    return rounded_sum(rounded_sum(first, rounded_product(static_cast<acc_t>(i), step)), shift);
  }
};

struct SampleRange {
  int64_t begin, end;
};

// Converts v to an index in 0..most; NaN gives 0.
template <typename acc_t>
DCN_HD int64_t clamp_index(acc_t v, int64_t most) {
  if (!(v > acc_t(0))) return 0;
  return v < static_cast<acc_t>(most) ? static_cast<int64_t>(v) : most;
}

// A range that contains the indices of all samples within [-1, size], the widest limits of any border. It allows for
// rounding errors of one pixel and two indices: a sample at a coordinate above 2^20 may be missed, but no loop becomes
// long.
template <typename acc_t>
DCN_HD SampleRange samples_near(const SampleAxis<acc_t>& axis, int32_t size) {
  if (size == 0) return {0, 0};
  const int64_t most = int64_t(1) << 53;
  const int64_t count = clamp_index(axis.count, most);
  const acc_t first = axis.first < 0 ? -axis.first : axis.first, shift = axis.shift < 0 ? -axis.shift : axis.shift;
  const acc_t rounding = (first + shift + static_cast<acc_t>(size)) / acc_t(1 << 20);
  const acc_t slack = acc_t(1) + (rounding < acc_t(1) ? rounding : acc_t(1));
  const acc_t base = axis.first + axis.shift, low = -slack - base, high = static_cast<acc_t>(size) + slack - base;
  if (axis.step == acc_t(0)) return {0, low <= 0 && high >= 0 ? count : 0};
  const acc_t from = (axis.step > 0 ? low : high) / axis.step, to = (axis.step > 0 ? high : low) / axis.step;
  const int64_t begin = clamp_index(from - acc_t(2), most), end = clamp_index(to + acc_t(3), most);
  return {begin, end < count ? end : count};
}

// Whether a sample at v reads a pixel. With a border of zeros a sample at exactly -1 has the value 0, but a nonzero
// right-hand derivative, see `locate`.
template <typename acc_t>
DCN_HD bool reads_something(Border border, acc_t v, int32_t size) {
  return is_valid(border, v, size) || (border == Border::zero && v == acc_t(-1));
}

// The exact range of samples that read a pixel. They are consecutive, because rounded sums and products preserve the
// order of the samples.
template <typename acc_t>
DCN_HD SampleRange valid_samples(Border border, const SampleAxis<acc_t>& axis, int32_t size) {
  SampleRange range = samples_near(axis, size);
  while (range.begin < range.end && !reads_something(border, axis.at(range.begin), size)) ++range.begin;
  while (range.begin < range.end && !reads_something(border, axis.at(range.end - 1), size)) --range.end;
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

}  // namespace dcnseg_ops
