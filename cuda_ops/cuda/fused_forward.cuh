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
#include "bilinear.h"
#include "deform_conv_params.h"
#include "tensor_core.cuh"
namespace dcnseg_ops {

constexpr int kTilePositions = 128;
constexpr int kRowBytes = 128;  // of a step, per position and per output
constexpr int kVectors = 8;     // of 16 bytes in a row

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
  int32_t positions;    // this and the number of pixels of the input leave room for a tile below 2^31
  int32_t height, width, channels, group_channels, offset_channels;  // the last: of an offset group
  int32_t group_outputs, out_channels, out_height, out_width;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, offset_groups;
  Border border;
  bool channels_last;
  bool output_in_vectors;  // it starts at a multiple of 16 bytes
  int32_t output_tiles;    // of a convolution group
  int32_t round_taps;      // most taps whose samples are in shared memory at once
  int32_t stages;          // of the ring

  DCN_HD int32_t taps() const { return kernel_h * kernel_w; }
  DCN_HD int32_t out_pixels() const { return out_height * out_width; }
};

DCN_HD int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }

// The block's part of the output.
struct FusedTile {
  int32_t first_position, positions;  // at most kTilePositions
  int32_t group;                      // of the convolution
  int32_t first_output, outputs;      // within the group
};

template <typename T>
__device__ inline FusedTile tile_of(const FusedArguments<T>& a, int32_t tile_outputs, int32_t block) {
  // Tiles of the same positions are neighbors: they sample the same pixels.
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

// Taps of one offset group, whose samples are in shared memory together, and the channels they serve.
struct Round {
  int32_t offset_group, first_tap, taps;
  int32_t channel_begin, channel_end;
};

// f(round) for all depth of a convolution group, in the order of producers and consumers alike.
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

// Shared memory, in this order: the ring, samples, barriers. Addresses of the ring are multiples of 1024, so that the
// order of vectors in a row is that of the 128-byte swizzle that wgmma knows.
template <int kOutputs>
struct FusedShared {
  static constexpr int kStageBytes = (kTilePositions + kOutputs) * kRowBytes;
  static constexpr int kSampleBytes = kTilePositions * (sizeof(int4) + sizeof(float4));  // of one tap
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

// Where a ring is: its next stage, and the parity of the phase in which that is filled.
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance(int stages) {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

// ---- producers

// Where a round's taps sample, for all positions of the tile. A thread has one position, and every tap or every second.
template <int kProducers, typename T>
__device__ inline void locate_samples(const FusedArguments<T>& a, const FusedTile& tile, const Round& round, int thread,
                                      int4* indices, float4* weights) {
  constexpr int kTapStride = kProducers / kTilePositions, kAtOnce = 3;  // whose offsets are requested together
  const int row = thread % kTilePositions;
  const int32_t position = tile.first_position + row, pixels = a.out_pixels();
  const int32_t image = position / pixels, pixel = position - image * pixels;
  const int32_t y = pixel / a.out_width, x = pixel - y * a.out_width;
  const int32_t first_pixel = image * (a.height * a.width);
  const int64_t plane = (int64_t{image} * a.offset_groups + round.offset_group) * a.taps() + round.first_tap;
  const float* offset = a.offset + 2 * plane * pixels + pixel;
  const float* mask = a.mask ? a.mask + plane * pixels + pixel : nullptr;
  int32_t tap_y = (round.first_tap + thread / kTilePositions) / a.kernel_w,
          tap_x = round.first_tap + thread / kTilePositions - tap_y * a.kernel_w;
  for (int first = thread / kTilePositions; first < round.taps; first += kAtOnce * kTapStride) {
    float dy[kAtOnce], dx[kAtOnce], factor[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * kTapStride;
      const bool exists = i < round.taps && row < tile.positions;
      dy[j] = exists ? offset[2 * int64_t{i} * pixels] : 0.0f;
      dx[j] = exists ? offset[(2 * int64_t{i} + 1) * pixels] : 0.0f;
      factor[j] = exists && mask ? mask[int64_t{i} * pixels] : 1.0f;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * kTapStride;
      if (i >= round.taps) break;
      const Bilinear<float> at =
          locate(a.border, static_cast<float>(y * a.stride_h - a.pad_h + tap_y * a.dilation_h) + dy[j],
                 static_cast<float>(x * a.stride_w - a.pad_w + tap_x * a.dilation_w) + dx[j], a.height, a.width);
      float corner[4];
      corner_weights(at.ly, at.lx, factor[j], corner);
      const auto over_images = [&](int32_t k) { return k < 0 || row >= tile.positions ? kOutside : first_pixel + k; };
      indices[i * kTilePositions + row] = make_int4(over_images(at.index[0]), over_images(at.index[1]),
                                                    over_images(at.index[2]), over_images(at.index[3]));
      weights[i * kTilePositions + row] = make_float4(corner[0], corner[1], corner[2], corner[3]);
      for (tap_x += kTapStride; tap_x >= a.kernel_w; tap_x -= a.kernel_w) ++tap_y;
    }
  }
}

struct Corners {
  uint4 of[4];
};

// 16 bytes of each corner's pixel, `first` being those of pixel 0; zeros for a corner outside.
__device__ inline Corners load_corners(const char* first, uint32_t pixel_bytes, const int4& index, bool wanted) {
  return {{load_or_zeros(first, index.x, pixel_bytes, wanted), load_or_zeros(first, index.y, pixel_bytes, wanted),
           load_or_zeros(first, index.z, pixel_bytes, wanted), load_or_zeros(first, index.w, pixel_bytes, wanted)}};
}

template <typename T>
__device__ inline uint32_t blend(uint32_t a, uint32_t b, uint32_t c, uint32_t d, const float4& w) {
  if constexpr (sizeof(T) == 2) {
    constexpr const T* kind = nullptr;
    const float2 p = unpack(a, kind), q = unpack(b, kind), r = unpack(c, kind), s = unpack(d, kind);
    return pack(w.x * p.x + w.y * q.x + w.z * r.x + w.w * s.x, w.x * p.y + w.y * q.y + w.z * r.y + w.w * s.y, kind);
  } else {
    return to_tf32(w.x * as_float(a) + w.y * as_float(b) + w.z * as_float(c) + w.w * as_float(d));
  }
}

template <typename T>
__device__ inline uint4 blend(const Corners& c, const float4& w) {
  const uint4 &p = c.of[0], &q = c.of[1], &r = c.of[2], &s = c.of[3];
  return {blend<T>(p.x, q.x, r.x, s.x, w), blend<T>(p.y, q.y, r.y, s.y, w), blend<T>(p.z, q.z, r.z, s.z, w),
          blend<T>(p.w, q.w, r.w, s.w, w)};
}

// Fills the ring for all steps of a tile. Eight threads have a row's eight vectors.
template <typename T, typename Multiplier>
__device__ inline void produce(const FusedArguments<T>& a, const FusedTile& tile,
                               const FusedShared<Multiplier::kOutputs>& shared, int thread) {
  constexpr int kThreads = Multiplier::kProducerWarps * kWarp, kRowStride = kThreads / kVectors,
                kRows = kTilePositions / kRowStride, kOutputRows = Multiplier::kOutputs / kRowStride;
  static_assert(kRowStride % 8 == 0);  // so that all rows of a thread are swizzled alike
  const int row = thread / kVectors, vector = thread % kVectors, lane = thread % kWarp;
  const uint32_t own = vector_address(row, vector), pixel_bytes = a.channels * sizeof(T),
                 output_bytes = a.taps() * a.group_channels * sizeof(T);
  const char* input = reinterpret_cast<const char*>(a.input) + vector * 16;
  const char* weight_row = reinterpret_cast<const char*>(a.weight) + vector * 16 +
                           (int64_t{tile.group} * a.group_outputs + tile.first_output + row) * output_bytes;
  RingPlace place;
  for_rounds(a, tile.group, [&](const Round& round) {
    sync_named<kThreads>(kProducerBarrier);  // all have read the samples that are overwritten now
    locate_samples<kThreads>(a, tile, round, thread, shared.indices, shared.weights);
    sync_named<kThreads>(kProducerBarrier);
    const int4* own_index = shared.indices + row;
    const float4* own_weight = shared.weights + row;
    const auto corners_at = [&](int32_t channel, const int4& index) {
      return load_corners(input + channel * static_cast<int64_t>(sizeof(T)), pixel_bytes, index,
                          vector < vectors_in_step<T>(round, channel));
    };
    Corners corners = corners_at(round.channel_begin, own_index[0]);
    int4 index = own_index[kRowStride];  // of the row that is requested next
    for (int32_t channel = round.channel_begin, tap = 0; channel < round.channel_end;) {
      const bool wanted = vector < vectors_in_step<T>(round, channel);
      const int64_t depth = int64_t{round.first_tap + tap} * a.group_channels + channel - tile.group * a.group_channels;
      const char* weight = weight_row + depth * static_cast<int64_t>(sizeof(T));
      const uint32_t columns_to = shared.columns(place.stage) + own, weight_to = shared.weight(place.stage) + own;
      wait_for(shared.empty + place.stage, place.parity ^ 1);
#pragma unroll
      for (int i = 0; i < kOutputRows; ++i)
        copy_async(weight_to + i * kRowStride * kRowBytes, weight + uint64_t{output_bytes * (i * kRowStride)},
                   wanted && row + i * kRowStride < tile.outputs);
      commit_copies();
      const int32_t next_tap = tap + 1 < round.taps ? tap + 1 : 0;
      const int32_t next_channel = next_tap ? channel : channel + kStepChannels<T>;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        // The next row's corners, at last those of the next step, are requested before this one's are waited for.
        const Corners next = corners_at(i + 1 < kRows ? channel : next_channel, index);
        index = i + 2 < kRows ? own_index[tap * kTilePositions + (i + 2) * kRowStride]
                              : own_index[next_tap * kTilePositions + (i + 2 - kRows) * kRowStride];
        store_shared(columns_to + i * kRowStride * kRowBytes,
                     blend<T>(corners, own_weight[tap * kTilePositions + i * kRowStride]));
        corners = next;
      }
      wait_for_copies<0>();
      if constexpr (Multiplier::kRoundsWeight) {  // without these braces nvcc 13.0 drops publish() where it is false
#pragma unroll
        for (int i = 0; i < kOutputRows; ++i) {  // what this thread has copied
          const uint32_t at = weight_to + i * kRowStride * kRowBytes;
          const uint4 v = load_shared(at);
          store_shared(
              at, {to_tf32(as_float(v.x)), to_tf32(as_float(v.y)), to_tf32(as_float(v.z)), to_tf32(as_float(v.w))});
        }
      }
      Multiplier::publish();
      __syncwarp();
      if (lane == 0) arrive(shared.full + place.stage);
      place.advance(a.stages);
      tap = next_tap;
      channel = next_channel;
    }
  });
}

// ---- consumers

// Machine code is made for one of the two below, on the host both.
#if defined(DCN_EMULATE) || !defined(__CUDA_ARCH__)
constexpr bool kBuildsWgmma = true, kBuildsMmaSync = true;
#else
constexpr bool kBuildsWgmma = DCN_HAS_WGMMA, kBuildsMmaSync = !kBuildsWgmma;
#endif

// Multiplies by mma.sync. Warps lie kWarpsDown x kWarpsAcross over the tile.
template <typename T, int kTileOutputs>
struct MmaSync {
  static constexpr bool kIsBuilt = kBuildsMmaSync, kMovesRegisters = false, kRoundsWeight = false;
  static constexpr int kOutputs = kTileOutputs;
  static constexpr int kBlocks = kOutputs == 64 ? 2 : 1;  // at once on a multiprocessor
  static constexpr int kWarpsDown = 2, kWarpsAcross = kOutputs / 32;
  static constexpr int kConsumerWarps = kWarpsDown * kWarpsAcross, kProducerWarps = 8 / kBlocks;
  static constexpr int kDown = kTilePositions / kWarpsDown / 16, kAcross = kOutputs / kWarpsAcross / 8;
  static_assert(kAcross % 4 == 0);
  float sums[kDown][kAcross][4];  // as mma's D: 16 rows x 8 columns each
  int warp, lane;

  __device__ explicit MmaSync(int thread) : warp(thread / kWarp), lane(thread % kWarp) {
#pragma unroll
    for (int i = 0; i < kDown * kAcross * 4; ++i) sums[i / 4 / kAcross][i / 4 % kAcross][i % 4] = 0;
  }
  // The first row and column of a part of the sums.
  __device__ int row(int down) const { return (warp / kWarpsAcross * kDown + down) * 16; }
  __device__ int column(int across) const { return (warp % kWarpsAcross * kAcross + across) * 8; }

  __device__ static void publish() {}  // the barrier's arrival is enough
  // Adds one stage, which has numbers in the first `parts` times 32 bytes of its depth; it may be overwritten then.
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

// Multiplies by wgmma, both sides from shared memory. Of two warpgroups each has 64 positions; one alone has all.
template <typename T, int kTileOutputs>
struct Wgmma {
  static constexpr bool kIsBuilt = kBuildsWgmma;
  static constexpr int kOutputs = kTileOutputs;
  static constexpr int kBlocks = kOutputs == 64 ? 2 : 1;  // at once on a multiprocessor
  static constexpr int kWarpgroups = 2 / kBlocks, kConsumerWarps = 4 * kWarpgroups, kProducerWarps = 8 / kBlocks;
  // Sums of 256 outputs are 128 registers of each consumer, which the producers give away.
  static constexpr bool kMovesRegisters = kOutputs == 256;
  static constexpr int kConsumerRegisters = 168, kProducerRegisters = 88;
  static constexpr bool kRoundsWeight = sizeof(T) == 4;  // wgmma would cut a float's last bits off
  static constexpr int kDown = 2 / kWarpgroups, kAcross = kOutputs / 8;
  // Of one instruction. With 256, ptxas wants 154 registers of every thread of the block.
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
  // Start, distance of groups of eight rows, and the 128-byte swizzle, all but the last in 16 bytes.
  __device__ static uint64_t descriptor(uint32_t address) {
    return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{8 * kRowBytes >> 4} << 32 | uint64_t{1} << 62;
  }
  // All parts, zeros too: with a choice in between the compiler waits for every product before the next.
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

// Lane q of four has parts 0..3 of a matrix's row q; afterwards row 0..3 of its column q.
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

// Four neighboring lanes have 8 columns of a row in each part of the sums.
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

// A row of outputs in shared memory, [kOutputs][positions], is so long that the 32 numbers that a warp has of two
// neighboring columns, 8 rows x 4 columns, lie in different banks.
template <typename T>
constexpr int kStagedPitch = kTilePositions + 16 / sizeof(T);

// Turned in shared memory, which every stage of the ring has been read from: positions are neighbors in the output.
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
      pixels % kPer == 0) {  // then a vector of positions is in one image, and tile.positions is whole vectors
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
        __syncwarp();  // tensor cores take whole warps
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
