// From the column gradients: the gradients of offset, mask and input, and the columns themselves, which replace their
// gradients and are needed for the gradient of the weight. Independent of torch (see kernel_common.cuh).
//
// `lanes` lanes of a warp (8, 16 or 32) share a spot. Each processes every lanes-th vector of V channels: it reads the
// column gradient and the four corners once for all outputs. The dot products over the channels are summed within the
// warp in a fixed order and written by one lane.
//
// Pitfall: the gradient of the input is added with atomics in any order, so that its last bits may differ between
// runs. dcnseg uses the PyTorch implementation if deterministic algorithms are enabled.
//
// Most of the traffic are the additions: 36 x 4 C bytes per position for 9 taps, compared with 18 C bytes of columns
// read (and written, if the gradient of the weight is needed) and 72 C bytes of corners. They are executed in the L2
// cache, where sums of neighboring positions meet. On GPUs that support it, one instruction adds four elements, and
// adjacent lanes add adjacent 16 bytes.
#pragma once
#include "cuda/conv/sample_columns.cuh"
namespace dcnseg_ops {

template <typename A>
struct ColumnGrads {  // null if not needed; shaped like offset, mask and input, that of the input in the type of sums
  A *offset, *mask, *input;
};

// Adds weight[k] * grad to N channels of each corner, starting at `channel`, of the gradient of the input.
template <int N, typename A>
__device__ inline void add_to_corners(const Spot<A>& spot, int64_t channel, const A* grad, A* grad_input) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (spot.corner[k] == kOutside) continue;
    A values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = spot.weight[k] * grad[i];
    add_to_memory<N>(grad_input + spot.corner[k] + channel, values);
  }
}

// The same for 8 channels per lane, of which an addition takes 4: two adjacent lanes with 16 channels exchange halves
// and add first those of the even lane, then those of the odd one. Both lanes must have channels or none; all take
// part.
template <typename A>
__device__ inline void add_pairs_to_corners(const Spot<A>& spot, bool has, int64_t channel, const A* grad,
                                            A* grad_input) {
  const bool odd = threadIdx.x & 1;
  A even_part[4], odd_part[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const A other = __shfl_xor_sync(~0u, odd ? grad[i] : grad[4 + i], 1);
    even_part[i] = odd ? other : grad[i];
    odd_part[i] = odd ? grad[4 + i] : other;
  }
  if (!has) return;
  const int64_t pair = odd ? channel - 8 + 4 : channel;
  add_to_corners<4>(spot, pair, even_part, grad_input);
  add_to_corners<4>(spot, pair + 8, odd_part, grad_input);
}

template <typename A>
__device__ inline void write_position_grads(const DeformConvParams& p, const Spot<A>& spot, const A* dot,
                                            const ColumnGrads<A>& grads) {
  A grad_y, grad_x, grad_mask;
  position_gradient(dot, spot.ly, spot.lx, spot.mask, &grad_y, &grad_x, &grad_mask);
  if (grads.offset) {
    grads.offset[spot.y_at] = grad_y;
    grads.offset[spot.y_at + p.out_pixels()] = grad_x;
  }
  if (grads.mask) grads.mask[spot.mask_at] = grad_mask;
}

template <typename T, typename A, int N>
__global__ void __launch_bounds__(kThreads)
    column_grads(DeformConvParams p, const T* input, Positions<A> positions, Range range, int lanes,
                 bool columns_wanted, T* columns, ColumnGrads<A> grads) {
  __shared__ Spot<A> spots[kSpots];
  const int count = make_spots(p, positions, range, spots);
  const int chunks = static_cast<int>(p.offset_group_channels() / N), lane = static_cast<int>(threadIdx.x) % lanes;
  const bool dots_wanted = grads.offset || grads.mask;
  // All lanes of a warp execute every iteration, as the exchange between lanes requires.
  for (int at = static_cast<int>(threadIdx.x) / lanes; at < kSpots; at += static_cast<int>(blockDim.x) / lanes) {
    const Spot<A>& spot = spots[at];
    A dot[4] = {0, 0, 0, 0};
    for (int first = 0; first < chunks; first += lanes) {
      const bool has = at < count && first + lane < chunks;
      const int64_t channel = (first + lane) * static_cast<int64_t>(N);
      A grad[N] = {};
      if (has) {
        T* column = columns + column_at(p, range.count, spot.column, spot.channel + channel);
        const Vector<T, N> raw = load<T, N>(column);
#pragma unroll
        for (int i = 0; i < N; ++i) grad[i] = to_sum(raw.v[i]);
        if (dots_wanted || columns_wanted) {
          Vector<T, N> corners[4];
          load_corners(input, spot, channel, corners);
#pragma unroll
          for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int i = 0; i < N; ++i) dot[k] += grad[i] * to_sum(corners[k].v[i]);
          if (columns_wanted) store(column, blend(spot.weight, corners));
        }
      }
      if (grads.input) {
        if constexpr (N == 8)
          add_pairs_to_corners(spot, has, channel, grad, grads.input);
        else if (has)
          add_to_corners<N>(spot, channel, grad, grads.input);
      }
    }
    if (dots_wanted) {
      for (int distance = lanes / 2; distance > 0; distance /= 2)
#pragma unroll
        for (int k = 0; k < 4; ++k) dot[k] += __shfl_xor_sync(~0u, dot[k], distance);
      if (lane == 0 && at < count) write_position_grads(p, spot, dot, grads);
    }
  }
}

// Number of lanes that share a spot: at most its number of vectors, and at least 8, so that all threads have work.
inline int lanes_for(const DeformConvParams& p, int numbers) {
  const int64_t chunks = p.offset_group_channels() / numbers;
  return chunks > 16 ? 32 : chunks > 8 ? 16 : 8;
}

}  // namespace dcnseg_ops
