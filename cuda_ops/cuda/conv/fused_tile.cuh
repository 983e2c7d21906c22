// The parts of a tile of the fused forward: arguments, rounds of taps, shared memory. See fused_forward.cuh.
#pragma once
#include "bilinear.h"
#include "cuda/conv/tensor_core.cuh"
#include "deform_conv_params.h"
namespace dcnseg_ops {

constexpr int kTilePositions = 128;
constexpr int kRowBytes = 128;  // per step, position and output
constexpr int kVectors = 8;     // vectors of 16 bytes per row

constexpr int kProducerBarrier = 1, kConsumerBarrier = 2;  // named barriers

template <typename T>
constexpr int kPerVector = 16 / sizeof(T);
template <typename T>
constexpr int kStepChannels = kVectors * kPerVector<T>;

template <typename T>
struct FusedArguments {
  const T* input;       // [B, H, W, C]
  const float* offset;  // [B, 2*G*T, H_out, W_out]
  const float* mask;    // [B, G*T, H_out, W_out], or null
  const T* weight;      // [C_out][T][C/groups]
  const T* bias;        // [C_out], or null
  T* output;            // [B, H_out, W_out, C_out] or, if not channels_last, [B, C_out, H_out, W_out]
  int32_t positions;    // this and the number of input pixels are below 2^31 by at least one tile
  int32_t height, width, channels, group_channels, offset_channels;  // the last one: per offset group
  int32_t group_outputs, out_channels, out_height, out_width;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, offset_groups;
  Border border;
  bool channels_last;
  bool output_in_vectors;  // aligned to 16 bytes
  int32_t output_tiles;    // per convolution group
  int32_t round_taps;      // maximum number of taps whose samples are in shared memory at once
  int32_t stages;          // in the ring

  DCN_HD int32_t taps() const { return kernel_h * kernel_w; }
  DCN_HD int32_t out_pixels() const { return out_height * out_width; }
};

DCN_HD int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

// The block's part of the output.
struct FusedTile {
  int32_t first_position, positions;  // at most kTilePositions
  int32_t group;                      // convolution group
  int32_t first_output, outputs;      // within the group
};

template <typename T>
__device__ inline FusedTile tile_of(const FusedArguments<T>& a, int32_t tile_outputs, int32_t block) {
  // Tiles of the same positions are consecutive, because they sample the same pixels.
  const int32_t per_positions = a.channels / a.group_channels * a.output_tiles;
  const int32_t rest = block % per_positions;
  FusedTile tile;
  tile.first_position = block / per_positions * kTilePositions;
  tile.positions = least(a.positions - tile.first_position, kTilePositions);
  tile.group = rest / a.output_tiles;
  tile.first_output = rest % a.output_tiles * tile_outputs;
  tile.outputs = least(a.group_outputs - tile.first_output, tile_outputs);
  return tile;
}

// Taps of one offset group, whose samples are in shared memory together, and the channels that use them.
struct Round {
  int32_t offset_group, first_tap, taps;
  int32_t channel_begin, channel_end;
};

// f(round) for the whole depth of a convolution group, in the same order for producers and consumers.
template <typename T, typename F>
__device__ inline void for_rounds(const FusedArguments<T>& a, int32_t group, const F& f) {
  const int32_t group_end = (group + 1) * a.group_channels;
  for (int32_t begin = group * a.group_channels, end; begin < group_end; begin = end) {
    const int32_t g = begin / a.offset_channels;
    end = least((g + 1) * a.offset_channels, group_end);
    for (int32_t tap = 0; tap < a.taps(); tap += a.round_taps)
      f(Round{g, tap, least(a.round_taps, a.taps() - tap), begin, end});
  }
}

template <typename T>
__device__ inline int32_t vectors_in_step(const Round& round, int32_t channel) {
  return least((round.channel_end - channel) / kPerVector<T>, kVectors);
}

// Shared memory, in this order: ring, samples, barriers. The ring is aligned to 1024 bytes, so that the order of
// vectors in a row is the 128-byte swizzle of wgmma.
template <int kOutputs>
struct FusedShared {
  static constexpr int kStageBytes = (kTilePositions + kOutputs) * kRowBytes;
  static constexpr int kSampleBytes = kTilePositions * (sizeof(int4) + sizeof(float4));  // per tap
  unsigned char* ring;
  int4* indices;    // [taps][positions]: pixel of each corner over all images, or kOutside
  float4* weights;  // [taps][positions]
  uint64_t *full, *empty;
  uint32_t address;  // of the ring

  static constexpr size_t bytes(int stages, int round_taps) {
    return 1024 - 16 + static_cast<size_t>(stages) * (kStageBytes + 2 * sizeof(uint64_t)) +
           static_cast<size_t>(round_taps) * kSampleBytes;
  }
  __device__ FusedShared(unsigned char* memory, int stages, int round_taps) {
    address = shared_address(memory);
    ring = memory + (1024 - address % 1024) % 1024;
    address = shared_address(ring);
    indices = reinterpret_cast<int4*>(ring + stages * kStageBytes);
    weights = reinterpret_cast<float4*>(indices + round_taps * kTilePositions);
    full = reinterpret_cast<uint64_t*>(weights + round_taps * kTilePositions);
    empty = full + stages;
  }
  __device__ uint32_t columns(int stage) const { return address + stage * kStageBytes; }
  __device__ uint32_t weight(int stage) const { return columns(stage) + kTilePositions * kRowBytes; }
};

__device__ inline uint32_t vector_address(int row, int vector) { return row * kRowBytes + ((vector ^ row % 8) << 4); }

// Position in a ring: its next stage, and the parity of the phase in which that stage is filled.
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

}  // namespace dcnseg_ops
