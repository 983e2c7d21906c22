// The producer warps of the fused forward, which sample columns into the ring. See fused_forward.cuh.
#pragma once
#include "cuda/conv/fused_tile.cuh"
namespace dcnseg_ops {

// Sample positions of the taps of a round for all positions of the tile. A thread has one position, and all taps or
// every second one.
template <int kProducers, typename T>
__device__ inline void locate_samples(const FusedArguments<T>& a, const FusedTile& tile, const Round& round, int thread,
                                      int4* indices, float4* weights) {
  constexpr int kTapStride = kProducers / kTilePositions, kAtOnce = 3;  // taps whose offsets are loaded together
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

// 16 bytes of the pixel of each corner; `first` is the address for pixel 0. Zeros for a corner outside the map.
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

// Fills the ring for all steps of a tile. Eight threads have the eight vectors of a row.
template <typename T, typename Multiplier>
__device__ inline void produce(const FusedArguments<T>& a, const FusedTile& tile,
                               const FusedShared<Multiplier::kOutputs>& shared, int thread) {
  constexpr int kThreads = Multiplier::kProducerWarps * kWarp, kRowStride = kThreads / kVectors,
                kRows = kTilePositions / kRowStride, kOutputRows = Multiplier::kOutputs / kRowStride;
  static_assert(kRowStride % 8 == 0);  // so that all rows of a thread have the same swizzle
  const int row = thread / kVectors, vector = thread % kVectors, lane = thread % kWarp;
  const uint32_t own = vector_address(row, vector), pixel_bytes = a.channels * sizeof(T),
                 output_bytes = a.taps() * a.group_channels * sizeof(T);
  const char* input = reinterpret_cast<const char*>(a.input) + vector * 16;
  const char* weight_row = reinterpret_cast<const char*>(a.weight) + vector * 16 +
                           (int64_t{tile.group} * a.group_outputs + tile.first_output + row) * output_bytes;
  RingPlace place;
  for_rounds(a, tile.group, [&](const Round& round) {
    sync_named<kThreads>(kProducerBarrier);  // all threads have read the samples that are overwritten now
    locate_samples<kThreads>(a, tile, round, thread, shared.indices, shared.weights);
    sync_named<kThreads>(kProducerBarrier);
    const int4* own_index = shared.indices + row;
    const float4* own_weight = shared.weights + row;
    const auto corners_at = [&](int32_t channel, const int4& index) {
      return load_corners(input + channel * static_cast<int64_t>(sizeof(T)), pixel_bytes, index,
                          vector < vectors_in_step<T>(round, channel));
    };
    Corners corners = corners_at(round.channel_begin, own_index[0]);
    int4 index = own_index[kRowStride];  // of the row that is loaded next
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
        // The corners of the next row, finally those of the next step, are loaded before waiting for those of this
        // row.
        const Corners next = corners_at(i + 1 < kRows ? channel : next_channel, index);
        index = i + 2 < kRows ? own_index[tap * kTilePositions + (i + 2) * kRowStride]
                              : own_index[next_tap * kTilePositions + (i + 2 - kRows) * kRowStride];
        store_shared(columns_to + i * kRowStride * kRowBytes,
                     blend<T>(corners, own_weight[tap * kTilePositions + i * kRowStride]));
        corners = next;
      }
      wait_for_copies<0>();
      if constexpr (Multiplier::kRoundsWeight) {  // without these braces nvcc 13.0 drops publish() if it is false
#pragma unroll
        for (int i = 0; i < kOutputRows; ++i) {  // the rows that this thread copied
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

}  // namespace dcnseg_ops
