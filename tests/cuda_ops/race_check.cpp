// Correct kernels and, with -DRACY, incorrect ones without atomics or without a barrier, to show that ThreadSanitizer
// detects races in the emulation.
#define DCN_EMULATE
#include <string>
#include "emulator/cuda_emu.h"
#ifdef RACY
#define atomicAdd(address, value) (*(address) += (value))
#endif
#include "cuda/roi/roi_pool.cuh"
using namespace dcnseg_ops;

// Of five boxes, the first and the last are the same pixel; the others are empty.
static void add_to_one_pixel(unsigned block) {
  const int32_t none[] = {0, 0, 0, 0, 0}, pixel[] = {0, 0, 1, 0, 1};
  std::vector<int32_t> bins;
  for (const auto* box : {&pixel, &none, &none, &none, &pixel}) bins.insert(bins.end(), *box, *box + 5);
  const float grad[5] = {1, 1, 1, 1, 2};
  float grad_input[1] = {0};
  RoiParams p{};
  p.batch = p.height = p.width = p.out_channels = p.kernel_h = p.kernel_w = p.group_h = p.group_w = 1;
  p.boxes = 5;
  p.input = p.output = dense_layout(1, 1, false);
  emu::blocks_overlap = true;
  DCN_LAUNCH((roi_mean_backward<float, float>), dim3(2), dim3(block), 0, 0, p, grad, bins.data(), grad_input);
}

__global__ void reverse(int* values) {
  __shared__ int shared[32];
  shared[threadIdx.x] = values[threadIdx.x];
#ifndef RACY
  __syncthreads();
#endif
  values[threadIdx.x] = shared[31 - threadIdx.x];
}

static void pass_through_shared_memory() {
  int values[32] = {};
  DCN_LAUNCH(reverse, dim3(1), dim3(32), 0, 0, values);
}

int main(int count, char** arguments) {
  const std::string which = count > 1 ? arguments[1] : "";
  if (which == "one_block") add_to_one_pixel(5);
  if (which == "two_blocks") add_to_one_pixel(3);
  if (which == "shared_memory") pass_through_shared_memory();
  return 0;
}
