// The forward of the deformable convolution as one kernel: columns are sampled into shared memory and multiplied there.
// No torch, so that it also compiles for the host emulation (DCN_EMULATE).
//
// A block makes 128 positions x kOutputs outputs of one convolution group. Its depth is cut into steps of 128 bytes of
// one tap (64 numbers; of float32 32), which pass through a ring of stages in shared memory:
//
//   producer warps: where the taps sample, once for all channels -> four corners by 16-byte loads over the channels ->
//                   blended in float32, rounded to T -> columns [128][128 bytes];
//                   weight [kOutputs][128 bytes] by cp.async
//   consumer warps: columns x weight in the tensor cores, float32 sums in registers -> bias -> output
//
// A row's 16-byte vectors lie at (vector ^ row % 8), so that neither the eight threads that write a row nor the eight
// rows that a tensor core reads at once meet in a bank. Taps go round inside of channels: the pixels that the taps of
// one 64 channels share are then still in the first cache. Sampling is repeated for every tile of outputs, so tiles
// are as wide as registers allow.
//
// Reckoned per step of 128 x 256 x 64 in cycles of one multiprocessor of compute capability 9.0, not measured:
//   tensor cores: 1024 by wgmma, about twice that by mma.sync
//   first cache and shared memory, 128 bytes a cycle: 64 KiB of corners 512, columns written 128, weight written 256,
//     samples 100, read by wgmma 768: each of two warpgroups reads all weights, and its columns for each 128 outputs
//   second cache, some 28 bytes a cycle: 32 KiB of weight 1170, pixels that the first cache has not 250 to 400
//   instructions, 4 a cycle: 8 warps x about 500, three quarters of them the blending, 1000
// So nothing leaves the others far behind, and all has to run at once: therefore the roles. To hide 400 cycles of
// latency at this rate some 15 KB have to be on their way: each of 256 producer threads requests the next row's four
// vectors, often two rows', before it waits for this row's.
//
// 64 outputs need half the shared memory and few registers: two blocks run at once, one samples positions or writes
// its output while the other multiplies. Three stages and not four leave more to the first cache.
//
// Traps: a row of zeros times a weight that is not finite is NaN; vectors beyond a group's channels are zeros in the
// columns and in the weight. A corner outside is never read.
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

// How a block's shared memory is divided.
struct FusedPlan {
  int stages, round_taps;
};

constexpr int kMostRoundTaps = 12;  // more samples would only take room from the first cache

// Three stages and all taps where they fit, else fewer; no stages if nothing fits.
template <typename T, typename Multiplier>
FusedPlan plan_fused(int32_t taps, size_t available) {
  using Shared = FusedShared<Multiplier::kOutputs>;
  const auto fits = [&](FusedPlan plan) {
    const size_t turned = Multiplier::kOutputs * kStagedPitch<T> * sizeof(T);  // see write_contiguous
    const int divided = plan.stages * Shared::kStageBytes + plan.round_taps * Shared::kSampleBytes;
    return Shared::bytes(plan.stages, plan.round_taps) <= available && turned <= static_cast<size_t>(divided);
  };
  for (int stages = Multiplier::kOutputs == 64 ? 2 : 3; stages >= 2; --stages)
    for (int rounds = (taps + kMostRoundTaps - 1) / kMostRoundTaps; rounds <= taps; ++rounds) {
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

// Whether the numbers of a convolution that the kernel keeps in 32 bits fit: pixels of all images, taps' coordinates
// before offsets, bytes of a tile's weight.
inline bool fits_fused_numbers(const DeformConvParams& p) {
  constexpr int64_t kMost = 1 << 30;
  const int64_t tile_weight = p.depth() * 256 * static_cast<int64_t>(sizeof(float));
  const auto farthest = [](int64_t size, int64_t stride, int64_t kernel, int64_t dilation) {
    return (size - 1) * stride + (kernel - 1) * dilation;
  };
  for (const int64_t small :
       {p.channels, p.out_channels, p.taps(), p.height, p.width, p.out_height, p.out_width, p.kernel_h, p.kernel_w,
        p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dilation_h, p.dilation_w})
    if (small < 0 || small > kMost) return false;
  return tile_weight <= kMost && p.batch * p.height * p.width <= kMost && p.positions() <= kMost &&
         farthest(p.out_height, p.stride_h, p.kernel_h, p.dilation_h) <= kMost &&
         farthest(p.out_width, p.stride_w, p.kernel_w, p.dilation_w) <= kMost;
}

}  // namespace dcnseg_ops
