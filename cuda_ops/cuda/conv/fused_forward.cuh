// The forward of the deformable convolution as one kernel: columns are sampled into shared memory and multiplied
// there. Independent of torch, so that it also compiles for the host emulation (DCN_EMULATE).
//
// A block computes 128 positions x kOutputs outputs of one convolution group. Its depth is divided into steps of 128
// bytes of one tap (64 elements; 32 of float32), which pass through a ring of stages in shared memory:
//
//   producer warps: sample positions of the taps, once for all channels -> four corners by 16-byte loads over the
//                   channels -> interpolated in float32, rounded to T -> columns [128][128 bytes];
//                   weight [kOutputs][128 bytes] by cp.async
//   consumer warps: columns x weight on the tensor cores, float32 sums in registers -> bias -> output
//
// The 16-byte vectors of a row are stored at (vector ^ row % 8), which avoids bank conflicts both for the eight
// threads that write a row and for the eight rows that a tensor core reads at once. Taps are iterated within 64
// channels, so that the pixels that taps share are still in the L1 cache. Sampling is repeated for every tile of
// outputs, so that tiles are as wide as the registers allow.
//
// Estimated, not measured, per step of 128 x 256 x 64 in cycles of one multiprocessor of compute capability 9.0:
//   tensor cores: 1024 with wgmma, about twice that with mma.sync
//   L1 cache and shared memory, 128 bytes per cycle: 64 KiB of corners 512, columns written 128, weight written 256,
//     samples 100, read by wgmma 768: each of two warpgroups reads the whole weight, and its columns per 128 outputs
//   L2 cache, about 28 bytes per cycle: 32 KiB of weight 1170, pixels that miss the L1 cache 250 to 400
//   instructions, 4 per cycle: 8 warps x about 500, three quarters of them interpolation, 1000
// No resource dominates, so that all must be used concurrently; hence the specialized warps. Hiding a latency of 400
// cycles at this rate needs about 15 KB in flight: each of 256 producer threads loads the four vectors of the next
// row, often of the next two rows, before it waits for those of the current row.
//
// 64 outputs need half the shared memory and few registers: two blocks are resident, and one computes sample positions
// or writes its output while the other multiplies. Three stages instead of four leave more memory to the L1 cache.
//
// Pitfalls: a row of zeros times a nonfinite weight is NaN; vectors after the channels of a group are zero in the
// columns and in the weight. A corner outside the map is never read.
#pragma once
#include "cuda/conv/fused_consumer.cuh"
#include "cuda/conv/fused_producer.cuh"
namespace dcnseg_ops {

template <typename Multiplier>
constexpr int kFusedThreads = (Multiplier::kConsumerWarps + Multiplier::kProducerWarps) * kWarp;

template <typename T, typename Multiplier>
__device__ inline void convolve_tile(const FusedArguments<T>& a, unsigned char* memory) {
  const FusedShared<Multiplier::kOutputs> shared(memory, a.stages, a.round_taps);
  const FusedTile tile = tile_of(a, Multiplier::kOutputs, static_cast<int32_t>(blockIdx.x));
  if (threadIdx.x == 0)
    for (int i = 0; i < a.stages; ++i) {
      init_barrier(shared.full + i, Multiplier::kProducerWarps);
      init_barrier(shared.empty + i, Multiplier::kConsumerWarps);
    }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x), consumers = Multiplier::kConsumerWarps * kWarp;
  if (thread < consumers) {
    if constexpr (Multiplier::kMovesRegisters) raise_registers<Multiplier::kConsumerRegisters>();
    consume<T, Multiplier>(a, tile, shared, thread);
  } else {
    if constexpr (Multiplier::kMovesRegisters) lower_registers<Multiplier::kProducerRegisters>();
    produce<T, Multiplier>(a, tile, shared, thread - consumers);
  }
}

template <typename T, typename Multiplier>
__global__ void __launch_bounds__(kFusedThreads<Multiplier>, Multiplier::kBlocks)
    fused_forward_kernel(FusedArguments<T> a) {
  DCN_DYN_SMEM(unsigned char, memory);
  if constexpr (Multiplier::kIsBuilt) convolve_tile<T, Multiplier>(a, memory);
}

// ---- launch

// Division of the shared memory of a block.
struct FusedPlan {
  int stages, round_taps;
};

constexpr int kMaxRoundTaps = 12;  // more samples would only take room from the first cache

// Three stages and all taps if they fit, otherwise fewer; no stages if nothing fits.
template <typename T, typename Multiplier>
FusedPlan plan_fused(int32_t taps, size_t available) {
  using Shared = FusedShared<Multiplier::kOutputs>;
  const auto fits = [&](FusedPlan plan) {
    const size_t turned = Multiplier::kOutputs * kStagedPitch<T> * sizeof(T);  // see write_contiguous
    const int divided = plan.stages * Shared::kStageBytes + plan.round_taps * Shared::kSampleBytes;
    return Shared::bytes(plan.stages, plan.round_taps) <= available && turned <= static_cast<size_t>(divided);
  };
  for (int stages = Multiplier::kOutputs == 64 ? 2 : 3; stages >= 2; --stages)
    for (int rounds = (taps + kMaxRoundTaps - 1) / kMaxRoundTaps; rounds <= taps; ++rounds) {
      const FusedPlan plan{stages, (taps + rounds - 1) / rounds};
      if (stages == 3 && plan.round_taps < least(taps, 3)) break;
      if (fits(plan)) return plan;
    }
  return {0, 0};
}

template <typename T>
FusedArguments<T> fused_arguments(const DeformConvParams& p, int32_t tile_outputs, FusedPlan plan) {
  const auto number = [](int64_t v) { return static_cast<int32_t>(v); };
  FusedArguments<T> a{};
  a.positions = p.positions();
  a.height = number(p.height), a.width = number(p.width), a.channels = number(p.channels);
  a.group_channels = number(p.group_channels()), a.offset_channels = number(p.offset_group_channels());
  a.group_outputs = number(p.group_outputs()), a.out_channels = number(p.out_channels);
  a.out_height = number(p.out_height), a.out_width = number(p.out_width);
  a.kernel_h = number(p.kernel_h), a.kernel_w = number(p.kernel_w);
  a.stride_h = number(p.stride_h), a.stride_w = number(p.stride_w);
  a.pad_h = number(p.pad_h), a.pad_w = number(p.pad_w);
  a.dilation_h = number(p.dilation_h), a.dilation_w = number(p.dilation_w);
  a.offset_groups = number(p.offset_groups);
  a.border = p.border;
  a.output_tiles = (a.group_outputs + tile_outputs - 1) / tile_outputs;
  a.round_taps = plan.round_taps, a.stages = plan.stages;
  return a;
}

template <typename T>
int64_t fused_blocks(const FusedArguments<T>& a) {
  const int64_t tiles = (a.positions + kTilePositions - 1) / kTilePositions;
  return tiles * (a.channels / a.group_channels) * a.output_tiles;
}

// Whether the values that the kernel stores in 32 bits fit: pixels of all images, coordinates of taps without offsets,
// bytes of the weight of a tile.
inline bool fits_fused_numbers(const DeformConvParams& p) {
  constexpr int64_t kMax = 1 << 30;
  const int64_t tile_weight = p.depth() * 256 * static_cast<int64_t>(sizeof(float));
  const auto farthest = [](int64_t size, int64_t stride, int64_t kernel, int64_t dilation) {
    return (size - 1) * stride + (kernel - 1) * dilation;
  };
  for (const int64_t small :
       {p.channels, p.out_channels, p.taps(), p.height, p.width, p.out_height, p.out_width, p.kernel_h, p.kernel_w,
        p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w})
    if (small < 0 || small > kMax) return false;
  return tile_weight <= kMax && p.batch * p.height * p.width <= kMax && p.positions() <= kMax &&
         farthest(p.out_height, p.stride_h, p.kernel_h, p.dilation_h) <= kMax &&
         farthest(p.out_width, p.stride_w, p.kernel_w, p.dilation_w) <= kMax;
}

}  // namespace dcnseg_ops
