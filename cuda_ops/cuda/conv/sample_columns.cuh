// Columns of a range of positions. Independent of torch (see kernel_common.cuh).
//
// Adjacent threads have adjacent vectors of V channels of one spot, so that reads of the four corners and writes of
// the columns are coalesced; sums are computed in A. A spot needs four reads of its channels, of which the L1 cache
// serves those that neighboring taps and positions share, and one write: with C channels of bfloat16 and 9 taps a
// position writes 18 C bytes, so that the columns of a tile should stay in the L2 cache (conv_tiles.h), where the GEMM
// reads them. Offsets and masks add 108 bytes.
#pragma once
#include "cuda/conv/taps.cuh"
#include "cuda/vectors.cuh"
namespace dcnseg_ops {

// The bilinear sum of N channels; corners outside the map count as zeros, so that a NaN weight gives NaN.
template <typename T, typename A, int N>
__device__ inline Vector<T, N> blend(const A* weight, const Vector<T, N>* corners) {
  Vector<T, N> column;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    A sum = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) sum += weight[k] * to_sum(corners[k].v[i]);
    column.v[i] = Value<T>::from(sum);
  }
  return column;
}

template <typename T, int N, typename A>
__device__ inline void load_corners(const T* input, const Spot<A>& spot, int64_t channel, Vector<T, N>* corners) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
    corners[k] = spot.corner[k] == kOutside ? zeros<T, N>() : load<T, N>(input + spot.corner[k] + channel);
}

template <typename T, typename A, int N>
__global__ void __launch_bounds__(kThreads)
    sample_columns(DeformConvParams p, const T* input, Positions<A> positions, Range range, T* columns) {
  __shared__ Spot<A> spots[kSpots];
  const int count = make_spots(p, positions, range, spots);
  // The vectors of a thread are blockDim.x apart; the division is done once.
  const int chunks = static_cast<int>(p.offset_group_channels() / N), threads = static_cast<int>(blockDim.x);
  const int step = threads / chunks, rest = threads % chunks;
  int at = static_cast<int>(threadIdx.x) / chunks, chunk = static_cast<int>(threadIdx.x) % chunks;
  while (at < count) {
    const Spot<A>& spot = spots[at];
    const int64_t channel = chunk * static_cast<int64_t>(N);
    Vector<T, N> corners[4];
    load_corners(input, spot, channel, corners);
    store(columns + column_at(p, range.count, spot.column, spot.channel + channel), blend(spot.weight, corners));
    at += step, chunk += rest;
    if (chunk >= chunks) ++at, chunk -= chunks;
  }
}

}  // namespace dcnseg_ops
