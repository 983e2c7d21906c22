// Transposes between planes, [images][channels][pixels], and rows, [positions][channels]: tiles of 32 x 32 elements go
// through shared memory, so that reads and writes are coalesced. Independent of torch (see kernel_common.cuh).
#pragma once
#include "cuda/conv/taps.cuh"
namespace dcnseg_ops {

constexpr int kSide = 32;

inline dim3 tiles_of(int64_t positions, int64_t channels) {
  return dim3(static_cast<unsigned>((positions + kSide - 1) / kSide),
              static_cast<unsigned>((channels + kSide - 1) / kSide));
}
inline dim3 tile_threads() { return dim3(kSide, kThreads / kSide); }

// The address of a channel of a position in planes.
__device__ inline int64_t in_planes(int64_t position, int64_t channel, int64_t channels, int64_t pixels) {
  return (position / pixels * channels + channel) * pixels + position % pixels;
}

// Rows of the positions `range`; the planes start with position 0.
template <typename T>
__global__ void planes_to_rows(const T* planes, int64_t channels, int64_t pixels, Range range, T* rows) {
  __shared__ T tile[kSide][kSide + 1];
  const int64_t first = blockIdx.x * static_cast<int64_t>(kSide), channel0 = blockIdx.y * static_cast<int64_t>(kSide);
  const int64_t mine = first + threadIdx.x;
  for (unsigned j = threadIdx.y; j < kSide && channel0 + j < channels; j += blockDim.y)
    if (mine < range.count)
      tile[j][threadIdx.x] = planes[in_planes(range.first + mine, channel0 + j, channels, pixels)];
  __syncthreads();
  if (channel0 + threadIdx.x >= channels) return;
  for (unsigned j = threadIdx.y; j < kSide && first + j < range.count; j += blockDim.y)
    rows[(first + j) * channels + channel0 + threadIdx.x] = tile[threadIdx.x][j];
}

template <typename From, typename To>
__global__ void rows_to_planes(const From* rows, int64_t channels, int64_t pixels, Range range, To* planes) {
  __shared__ From tile[kSide][kSide + 1];
  const int64_t first = blockIdx.x * static_cast<int64_t>(kSide), channel0 = blockIdx.y * static_cast<int64_t>(kSide);
  if (channel0 + threadIdx.x < channels)
    for (unsigned j = threadIdx.y; j < kSide && first + j < range.count; j += blockDim.y)
      tile[j][threadIdx.x] = rows[(first + j) * channels + channel0 + threadIdx.x];
  __syncthreads();
  const int64_t mine = first + threadIdx.x;
  for (unsigned j = threadIdx.y; j < kSide && channel0 + j < channels; j += blockDim.y)
    if (mine < range.count)
      planes[in_planes(range.first + mine, channel0 + j, channels, pixels)] =
          Value<To>::from(to_sum(tile[threadIdx.x][j]));
}

// Copies `row` to each of `count` rows.
template <typename T>
__global__ void fill_rows(const T* row, int64_t channels, int64_t count, T* rows) {
  const int64_t first = blockIdx.x * static_cast<int64_t>(kSide), mine = blockIdx.y * kSide + threadIdx.x;
  if (mine >= channels) return;
  for (unsigned j = threadIdx.y; j < kSide && first + j < count; j += blockDim.y)
    rows[(first + j) * channels + mine] = row[mine];
}

}  // namespace dcnseg_ops
