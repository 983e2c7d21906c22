// dcnseg::roi_pool, roi_avg_pool, deform_roi_pool and their backwards for CPU tensors.
#pragma once
#include "cpu/roi/roi_windows.h"
#include "torch_c_abi.h"
namespace dcnseg_ops {

struct MaxPooled {
  Tensor output, argmax;
};
MaxPooled roi_pool(const Tensor& input, const Tensor& bins, int64_t kh, int64_t kw, bool channels_last);
Tensor roi_pool_backward(const Tensor& grad, const Tensor& input, const Tensor& bins, const Tensor& argmax);

struct RoiGrid {  // bins of a box, and their channel groups
  int64_t kh, kw, group_h, group_w;
};
Tensor roi_avg_pool(const Tensor& input, const Tensor& bins, const RoiGrid& grid, bool channels_last);
Tensor roi_avg_pool_backward(const Tensor& grad, const Tensor& input, const Tensor& bins, const RoiGrid& grid);

struct DeformRoiArgs {
  Tensor input, samples, shift;  // shift: empty if absent
  RoiGrid grid;
  Border border;
};
struct DeformRoiGrads {
  Tensor input, shift;
};  // empty if not needed
Tensor deform_roi_pool(const DeformRoiArgs& args, bool channels_last);
DeformRoiGrads deform_roi_pool_backward(const Tensor& grad, const DeformRoiArgs& args, bool input_wanted,
                                        bool shift_wanted);

}  // namespace dcnseg_ops
