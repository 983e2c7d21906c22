// The consumer warps of the fused forward, which multiply the stages of the ring and write the output. See
// fused_forward.cuh.
#pragma once
#include "cuda/conv/fused_tile.cuh"
namespace dcnseg_ops {

// Machine code contains one of the two below; on the host both are compiled.
#if defined(DCN_EMULATE) || !defined(__CUDA_ARCH__)
constexpr bool kBuildsWgmma = true, kBuildsMmaSync = true;
#else
constexpr bool kBuildsWgmma = DCN_HAS_WGMMA, kBuildsMmaSync = !kBuildsWgmma;
#endif

// GEMM by mma.sync. The warps form a grid of kWarpsDown x kWarpsAcross over the tile.
template <typename T, int kTileOutputs>
struct MmaSync {
  static constexpr bool kIsBuilt = kBuildsMmaSync, kMovesRegisters = false, kRoundsWeight = false;
  static constexpr int kOutputs = kTileOutputs;
  static constexpr int kBlocks = kOutputs == 64 ? 2 : 1;  // resident on a multiprocessor
  static constexpr int kWarpsDown = 2, kWarpsAcross = kOutputs / 32;
  static constexpr int kConsumerWarps = kWarpsDown * kWarpsAcross, kProducerWarps = 8 / kBlocks;
  static constexpr int kDown = kTilePositions / kWarpsDown / 16, kAcross = kOutputs / kWarpsAcross / 8;
  static_assert(kAcross % 4 == 0);
  float sums[kDown][kAcross][4];  // as D of mma: 16 rows x 8 columns each
  int warp, lane;

  __device__ explicit MmaSync(int thread) : warp(thread / kWarp), lane(thread % kWarp) {
#pragma unroll
    for (int i = 0; i < kDown * kAcross * 4; ++i) sums[i / 4 / kAcross][i / 4 % kAcross][i % 4] = 0;
  }
  // The first row and column of a fragment of the sums.
  __device__ int row(int down) const { return (warp / kWarpsAcross * kDown + down) * 16; }
  __device__ int column(int across) const { return (warp % kWarpsAcross * kAcross + across) * 8; }

  __device__ static void publish() {}  // the arrival at the barrier is sufficient
  // Adds one stage, in which the first `parts` times 32 bytes of the depth are filled. The stage may be overwritten
  // then.
  __device__ void multiply(uint32_t columns, uint32_t weight, int parts) {
#pragma unroll
    for (int k = 0; k < kVectors / 2; ++k) {
      if (k >= parts) break;
      uint32_t left[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i)
        load_matrices(left[i], columns + vector_address(row(i) + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int j = 0; j < kAcross; j += 2) {
        uint32_t right[4];
        load_matrices(right, weight + vector_address(column(j) + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        if constexpr (sizeof(T) == 4) {
#pragma unroll
          for (int r = 0; r < 4; ++r) right[r] = to_tf32(as_float(right[r]));
        }
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
          multiply_add(sums[i][j], left[i], right[0], right[1], static_cast<const T*>(nullptr));
          multiply_add(sums[i][j + 1], left[i], right[2], right[3], static_cast<const T*>(nullptr));
        }
      }
    }
  }
};

// GEMM by wgmma, with both operands in shared memory. Two warpgroups have 64 positions each; one alone has all.
template <typename T, int kTileOutputs>
struct Wgmma {
  static constexpr bool kIsBuilt = kBuildsWgmma;
  static constexpr int kOutputs = kTileOutputs;
  static constexpr int kBlocks = kOutputs == 64 ? 2 : 1;  // resident on a multiprocessor
  static constexpr int kWarpgroups = 2 / kBlocks, kConsumerWarps = 4 * kWarpgroups, kProducerWarps = 8 / kBlocks;
  // Sums of 256 outputs take 128 registers per consumer thread, which the producers release.
  static constexpr bool kMovesRegisters = kOutputs == 256;
  static constexpr int kConsumerRegisters = 168, kProducerRegisters = 88;
  static constexpr bool kRoundsWeight = sizeof(T) == 4;  // wgmma would truncate a float
  static constexpr int kDown = 2 / kWarpgroups, kAcross = kOutputs / 8;
  // Outputs per instruction. With 256, ptxas needs 154 registers for every thread of the block.
  static constexpr int kColumns = kOutputs < 128 ? kOutputs : 128;
  float sums[kDown][kAcross][4];
  int warp, lane;

  __device__ explicit Wgmma(int thread) : warp(thread / kWarp), lane(thread % kWarp) {
#pragma unroll
    for (int j = 0; j < kDown * kAcross * 4; ++j) sums[j / 4 / kAcross][j / 4 % kAcross][j % 4] = 0;
  }
  __device__ int row(int down) const { return (warp + 4 * down) * 16; }
  __device__ int column(int across) const { return across * 8; }

  __device__ static void publish() { fence_async_proxy(); }
  // Start address, stride between groups of eight rows, and the 128-byte swizzle; addresses in units of 16 bytes.
  __device__ static uint64_t descriptor(uint32_t address) {
    return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{8 * kRowBytes >> 4} << 32 | uint64_t{1} << 62;
  }
  // All parts, including zeros: with a branch in between, the compiler waits for each wgmma before the next one.
  __device__ void multiply(uint32_t columns, uint32_t weight, int) {
    using Sums = float[kColumns / 2];
    const uint64_t left = descriptor(columns + warp / 4 * 64 * kRowBytes), right = descriptor(weight);
    fence_products();
#pragma unroll
    for (int k = 0; k < kVectors / 2; ++k)  // a step along the depth moves the start within the swizzled rows
#pragma unroll
      for (int i = 0; i < kDown; ++i)
#pragma unroll
        for (int j = 0; j < kOutputs; j += kColumns)
          issue_product<kColumns>(reinterpret_cast<Sums&>(sums[i][j / 8]), left + (i * 64 * kRowBytes >> 4) + 2 * k,
                                  right + (j * kRowBytes >> 4) + 2 * k, static_cast<const T*>(nullptr));
    commit_products();
    wait_for_products<0>();
  }
};

// Lane q of four has elements 0..3 of row q of a matrix; afterwards it has rows 0..3 of column q.
__device__ inline void transpose_in_quad(uint32_t (&part)[4], int lane) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(i & distance)) {
        const uint32_t given = upper ? part[i] : part[i + distance];
        const uint32_t taken = __shfl_xor_sync(~0u, given, distance);
        if (upper)
          part[i] = taken;
        else
          part[i + distance] = taken;
      }
  }
}

template <typename T, typename Multiplier>
__device__ inline void add_bias_to(const FusedArguments<T>& a, const FusedTile& tile, Multiplier& m) {
  if (!a.bias) return;
  const T* bias = a.bias + int64_t{tile.group} * a.group_outputs + tile.first_output;
#pragma unroll
  for (int j = 0; j < Multiplier::kAcross; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = m.column(j) + m.lane % 4 * 2 + e;
      const float value = column < tile.outputs ? to_sum(bias[column]) : 0.0f;
#pragma unroll
      for (int i = 0; i < Multiplier::kDown; ++i) m.sums[i][j][e] += value, m.sums[i][j][e + 2] += value;
    }
}

// Four adjacent lanes have 8 columns of a row in each fragment of the sums.
template <typename T, typename Multiplier>
__device__ inline void write_channels_last(const FusedArguments<T>& a, const FusedTile& tile, const Multiplier& m) {
  const bool in_vectors = a.output_in_vectors && a.group_outputs % kPerVector<T> == 0;
  T* output = a.output + int64_t{tile.first_position} * a.out_channels + int64_t{tile.group} * a.group_outputs +
              tile.first_output;
  const int quad = m.lane % 4;
#pragma unroll
  for (int i = 0; i < Multiplier::kDown; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m.row(i) + m.lane / 4 + 8 * half;
      T* to = output + int64_t{row} * a.out_channels;
#pragma unroll
      for (int j = 0; j < Multiplier::kAcross; j += 4) {
        if constexpr (sizeof(T) == 2) {
          if (in_vectors) {
            uint32_t part[4];
#pragma unroll
            for (int k = 0; k < 4; ++k)
              part[k] =
                  pack(m.sums[i][j + k][2 * half], m.sums[i][j + k][2 * half + 1], static_cast<const T*>(nullptr));
            transpose_in_quad(part, m.lane);
            const int column = m.column(j) + 8 * quad;
            if (row < tile.positions && column < tile.outputs)
              *reinterpret_cast<uint4*>(to + column) = uint4{part[0], part[1], part[2], part[3]};
            continue;
          }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int column = m.column(j + k) + 2 * quad;
          const float left = m.sums[i][j + k][2 * half], right = m.sums[i][j + k][2 * half + 1];
          if (row >= tile.positions) continue;
          if constexpr (sizeof(T) == 4)
            if (in_vectors) {  // four lanes write 32 bytes
              if (column < tile.outputs) *reinterpret_cast<float2*>(to + column) = float2{left, right};
              continue;
            }
          if (column < tile.outputs) to[column] = Value<T>::from(left);
          if (column + 1 < tile.outputs) to[column + 1] = Value<T>::from(right);
        }
      }
    }
}

// The row length of the outputs in shared memory, [kOutputs][positions], is such that the 32 elements of a warp in two
// adjacent columns, 8 rows x 4 columns, are in different banks.
template <typename T>
constexpr int kStagedPitch = kTilePositions + 16 / sizeof(T);

// Transposed in shared memory, after all stages of the ring have been read: positions are adjacent in the output.
template <typename T, typename Multiplier>
__device__ inline void write_contiguous(const FusedArguments<T>& a, const FusedTile& tile, const Multiplier& m,
                                        T* staged) {
  constexpr int kThreadsOfAll = Multiplier::kConsumerWarps * kWarp, kPitch = kStagedPitch<T>;
  sync_named<kThreadsOfAll>(kConsumerBarrier);
#pragma unroll
  for (int i = 0; i < Multiplier::kDown; ++i)
#pragma unroll
    for (int j = 0; j < Multiplier::kAcross; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        staged[(m.column(j) + m.lane % 4 * 2 + e % 2) * kPitch + m.row(i) + m.lane / 4 + 8 * (e / 2)] =
            Value<T>::from(m.sums[i][j][e]);
  sync_named<kThreadsOfAll>(kConsumerBarrier);
  const int32_t pixels = a.out_pixels(), first_output = tile.group * a.group_outputs + tile.first_output;
  const auto number_at = [&](int row, int output) {
    const int32_t position = tile.first_position + row, image = position / pixels;
    return (int64_t{image} * a.out_channels + first_output + output) * pixels + (position - image * pixels);
  };
  constexpr int kPer = kPerVector<T>;
  if (a.output_in_vectors &&
      pixels % kPer == 0) {  // a vector of positions is in one image, and tile.positions is a multiple of it
    for (int i = m.warp * kWarp + m.lane; i < tile.outputs * (kTilePositions / kPer); i += kThreadsOfAll) {
      const int output = i / (kTilePositions / kPer), row = i % (kTilePositions / kPer) * kPer;
      if (row < tile.positions)
        *reinterpret_cast<uint4*>(a.output + number_at(row, output)) =
            *reinterpret_cast<const uint4*>(staged + output * kPitch + row);
    }
  } else {
    for (int i = m.warp * kWarp + m.lane; i < tile.outputs * kTilePositions; i += kThreadsOfAll) {
      const int output = i / kTilePositions, row = i % kTilePositions;
      if (row < tile.positions) a.output[number_at(row, output)] = staged[output * kPitch + row];
    }
  }
}

template <typename T, typename Multiplier>
__device__ inline void consume(const FusedArguments<T>& a, const FusedTile& tile,
                               const FusedShared<Multiplier::kOutputs>& shared, int thread) {
  Multiplier m(thread);
  RingPlace place;
  for_rounds(a, tile.group, [&](const Round& round) {
    for (int32_t channel = round.channel_begin; channel < round.channel_end; channel += kStepChannels<T>) {
      const int parts = (vectors_in_step<T>(round, channel) + 1) / 2;
      for (int32_t tap = 0; tap < round.taps; ++tap) {
        wait_for(shared.full + place.stage, place.parity);
        __syncwarp();  // tensor core instructions need whole warps
        m.multiply(shared.columns(place.stage), shared.weight(place.stage), parts);
        __syncwarp();
        if (m.lane == 0) arrive(shared.empty + place.stage);
        place.advance(a.stages);
      }
    }
  });
  add_bias_to(a, tile, m);
  if (a.channels_last)
    write_channels_last(a, tile, m);
  else
    write_contiguous(a, tile, m, reinterpret_cast<T*>(shared.ring));
}

}  // namespace dcnseg_ops
