// The forward of the deformable convolution on tensor cores, with the columns in shared memory (see
// fused_forward.cuh).
#pragma once
#include "cuda/torch_cuda.h"
#include "deform_conv_params.h"
namespace dcnseg_ops {

// Whether the fused kernel supports a call: bfloat16, float16, or float32 if TF32 is allowed; the channels of every
// convolution group and offset group are multiples of 16 bytes (8 elements, 4 of float32), and the input is aligned to
// 16 bytes; input and output have at most 2^30 pixels over all images; compute capability 8.0 or higher. Any number of
// outputs, taps, groups and offset groups, with or without a mask, and every border are supported.
bool fused_forward_serves(const DeformConvParams& p, const Tensor& input, bool allow_tf32);

// For supported calls: computes the output of p.batch images. Every tensor starts with the first of them and may
// contain no more images.
//
//   input        [B, H, W, C] in memory, dense
//   offset, mask [B, 2*G*T, H_out, W_out], [B, G*T, H_out, W_out] of float, contiguous; the mask may be empty
//   weight_rows  [C_out][T][C/groups], dense, aligned to 16 bytes
//   bias         [C_out] in the dtype of the input, or empty
//   output       dense: [B, H_out, W_out, C_out] in memory if channels_last, else [B, C_out, H_out, W_out]
//
// Launches one kernel on the stream, without synchronization or allocation: a CUDA graph can capture it.
void fused_forward(const DeformConvParams& p, const Tensor& input, const Tensor& offset, const Tensor& mask,
                   const Tensor& weight_rows, const Tensor& bias, const Tensor& output, bool channels_last,
                   cudaStream_t stream);

}  // namespace dcnseg_ops
