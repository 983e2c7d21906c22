// The forward of the deformable convolution on tensor cores, columns kept inside the chip (see fused_forward.cuh).
#pragma once
#include "cuda/torch_cuda.h"
#include "deform_conv_params.h"
namespace dcnseg_ops {

// Whether the tensor cores serve this call: bfloat16, float16, or float32 where sums may be made from tf32; channels of
// every convolution group and of every offset group in whole 16-byte vectors (8 numbers, of float32 4), and an input
// that starts at one; at most 2^30 pixels in all images together, of the input and of the output; compute capability
// 8.0 or more. Any number of outputs, taps, groups and offset groups, with or without a mask, and every border are
// served.
bool fused_forward_serves(const DeformConvParams& p, const Tensor& input, bool allow_tf32);

// For calls that are served: fills the output of p.batch images. Every tensor starts at the first of them; there need
// be no more of them than p.batch.
//   input        [B, H, W, C] in memory, dense
//   offset, mask [B, 2*G*T, H_out, W_out], [B, G*T, H_out, W_out] of float, contiguous; a mask may have no elements
//   weight_rows  [C_out][T][C/groups], dense, starting at a multiple of 16 bytes
//   bias         [C_out] of the input's type, or no elements
//   output       dense: [B, H_out, W_out, C_out] in memory if channels_last, else [B, C_out, H_out, W_out]
// Launches one kernel on the stream, without waiting or allocating: a CUDA graph can capture it.
void fused_forward(const DeformConvParams& p, const Tensor& input, const Tensor& offset, const Tensor& mask,
                   const Tensor& weight_rows, const Tensor& bias, const Tensor& output, bool channels_last,
                   cudaStream_t stream);

}  // namespace dcnseg_ops
