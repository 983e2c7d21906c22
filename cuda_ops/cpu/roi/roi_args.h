// Checks of everything the loops rely on, so that a direct call of an operator with wrong arguments raises an error.
#pragma once
#include <cmath>
#include <string>
#include "cpu/roi/roi_items.h"
#include "cpu/roi/roi_pool.h"
#include "cpu/values.h"
#include "torch_c_abi.h"
namespace dcnseg_ops {

inline RoiShape shape_of(const Tensor& input, const Tensor& boxes, const RoiGrid& grid) {
  DCN_CHECK(input.dim() == 4, "RoI operators: `input` must be [B, C, H, W]");
  DCN_CHECK(is_channels_last(input) || is_contiguous(input),
            "RoI operators: `input` must be contiguous or channels-last");
  DCN_CHECK(grid.kh >= 1 && grid.kw >= 1 && grid.kh <= INT32_MAX / grid.kw, "RoI operators: invalid number of bins");
  DCN_CHECK(boxes.dim() == 2, "RoI operators: bins and samples must be [R, ...]");
  const int64_t* n = input.sizes();
  const RoiShape p{n[0], n[1], n[2], n[3], boxes.sizes()[0], grid.kh, grid.kw, grid.group_h, grid.group_w};
  DCN_CHECK(
      grid.group_h >= 1 && grid.group_w >= 1 && grid.group_h <= INT32_MAX / grid.group_w && p.channels % p.cells() == 0,
      "RoI operators: the channels of `input` are not divisible by the groups");
  DCN_CHECK(p.height >= 1 && p.width >= 1, "RoI operators: `input` has no pixels");
  DCN_CHECK(p.height < INT32_MAX / p.width, "RoI operators: a map has 2^31 pixels or more");
  return p;
}

inline BinSource bins_of(const Tensor& bins, const RoiShape& p) {
  DCN_CHECK(
      bins.dtype() == aoti_torch_dtype_int32() && is_contiguous(bins) && bins.sizes()[1] == 1 + 2 * p.kh + 2 * p.kw,
      "RoI operators: `bins` must be contiguous int32 [R, 1 + 2*kh + 2*kw]");
  const BinSource source{bins.in<int32_t>(), p.kh, p.kw};
  for (int64_t r = 0; r < p.rois; ++r) {
    const int32_t *rows = source.box(r) + 1, *columns = rows + 2 * p.kh;
    const int64_t image = source.image(r);
    bool is_valid = image < p.batch;
    for (int64_t i = 0; i < 2 * p.kh && image >= 0; ++i) is_valid &= rows[i] >= 0 && rows[i] <= p.height;
    for (int64_t j = 0; j < 2 * p.kw && image >= 0; ++j) is_valid &= columns[j] >= 0 && columns[j] <= p.width;
    DCN_CHECK(is_valid, "RoI operators: `bins` of box " + std::to_string(r) + " are outside `input`");
  }
  return source;
}

template <typename A>
SampleSource<A> samples_of(const DeformRoiArgs& a, const RoiShape& p) {
  DCN_CHECK(a.samples.dtype() == sum_dtype(a.input) && is_contiguous(a.samples) &&
                a.samples.sizes()[1] == 1 + 3 * p.kh + 3 * p.kw,
            "deform_roi_pool: `samples` must be contiguous [R, 1 + 3*kh + 3*kw], float64 or float32 as the input");
  const bool has_shift = a.shift.numel() > 0;
  int64_t classes = 1, part_h = p.kh, part_w = p.kw;
  if (has_shift) {
    DCN_CHECK(a.shift.dim() == 4 && a.shift.dtype() == a.samples.dtype() && is_contiguous(a.shift) &&
                  a.shift.sizes()[0] == p.rois && a.shift.sizes()[1] % 2 == 0,
              "deform_roi_pool: `shift` must be contiguous [R, 2*classes, part_h, part_w], in the dtype of `samples`");
    classes = a.shift.sizes()[1] / 2, part_h = a.shift.sizes()[2], part_w = a.shift.sizes()[3];
    DCN_CHECK(p.outputs() % classes == 0,
              "deform_roi_pool: the output channels are not divisible by the classes of `shift`");
  }
  DCN_CHECK(a.border == Border::zero || a.border == Border::mmcv || a.border == Border::mxnet,
            "deform_roi_pool: unknown border");
  const SampleSource<A> source{a.samples.in<A>(), has_shift ? a.shift.in<A>() : nullptr, p, classes, part_h, part_w,
                               a.border};
  for (int64_t r = 0; r < p.rois; ++r) {
    const A image = source.box(r)[0];
    DCN_CHECK(image >= A(-1) && image < A(p.batch) && image == std::floor(image),
              "deform_roi_pool: box " + std::to_string(r) + " has an invalid image index");
  }
  return source;
}

inline void check_grad(const Tensor& grad, const Tensor& input, const RoiShape& p) {
  const int64_t* n = grad.sizes();
  DCN_CHECK(grad.dim() == 4 && grad.dtype() == input.dtype() && n[0] == p.rois && n[1] == p.outputs() && n[2] == p.kh &&
                n[3] == p.kw,
            "RoI operators: `grad` must be [R, C / groups, kh, kw], in the dtype of `input`");
}

// [R, outputs, kh, kw] in the dtype of `like`.
inline Tensor empty_output(const Tensor& like, const RoiShape& p, bool channels_last) {
  const std::vector<int64_t> sizes = {p.rois, p.outputs(), p.kh, p.kw};
  return channels_last ? empty_strided(sizes, channels_last_strides(sizes), like) : empty_contiguous(sizes, like);
}

}  // namespace dcnseg_ops
