// The RoI operators for CUDA tensors, see ops_roi.cu.
#pragma once
#include "torch_c_abi.h"
namespace dcnseg_ops {

void register_roi_operators(TorchLibraryHandle cuda);

}  // namespace dcnseg_ops
