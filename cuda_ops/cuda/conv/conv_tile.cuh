// One tile of the convolution: kernel launches that forward and backward share.
#pragma once
#include "cuda/conv/conv_rows.cuh"
#include "cuda/conv/conv_tiles.h"
#include "cuda/conv/deform_conv2d.h"
#include "cuda/conv/product.h"
#include "cuda/conv/sample_columns.cuh"
namespace dcnseg_ops {

inline int64_t cache_bytes(const Tensor& t) {
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, t.device_index()), "cudaDeviceGetAttribute");
  return bytes;
}

inline int64_t input_pixels(const DeformConvParams& p, int64_t images) { return images * p.height * p.width; }

// All channels of a spot in vectors of N elements: no vector crosses the end of a group, and all are aligned to their
// size.
template <typename T, int N>
bool vectors_fit(const DeformConvParams& p, const T* input) {
  return p.offset_group_channels() % N == 0 && p.group_channels() % N == 0 &&
         reinterpret_cast<uintptr_t>(input) % (N * sizeof(T)) == 0;
}

// f(the maximum number of elements that a thread can process at once, as a constant): 16 bytes; 8 bytes of 16-bit
// elements; or one element. `pairs`: threads with 8 elements exchange halves in pairs.
template <typename T, typename F>
void by_vector(const DeformConvParams& p, const T* input, bool pairs, const F& f) {
  constexpr int kMax = 16 / sizeof(T);
  if (vectors_fit<T, kMax>(p, input) && !(pairs && kMax == 8 && p.offset_group_channels() / kMax % 2 != 0))
    return f(std::integral_constant<int, kMax>{});
  if constexpr (kMax == 8)
    if (vectors_fit<T, 4>(p, input)) return f(std::integral_constant<int, 4>{});
  f(std::integral_constant<int, 1>{});
}

// The positions of the images starting with `first`.
template <typename A>
Positions<A> positions_from(const ConvCall& call, int64_t first) {
  const Positions<A> all{call.offset.in<A>(), call.mask.numel() ? call.mask.in<A>() : nullptr};
  return positions_of_image(call.p, all, first);
}

// `input` and `positions` start with the first image of `range`.
template <typename T, typename A>
void sample_tile(const ConvCall& call, const T* input, Positions<A> positions, Range range, T* columns) {
  by_vector(call.p, input, false, [&](auto numbers) {
    constexpr int kNumbers = decltype(numbers)::value;
    DCN_LAUNCH((sample_columns<T, A, kNumbers>), blocks_of_spots(call.p, range), dim3(kThreads), 0, call.stream, call.p,
               input, positions, range, columns);
    check_cuda(cudaGetLastError(), "sample_columns");
  });
}

// The columns of a tile, [groups][count][depth], and the rows of outputs or their gradients, [count][C_out], by group.
template <typename T>
Matrices<T> columns_of(const DeformConvParams& p, T* columns, int64_t count) {
  return {columns, p.depth(), count * p.depth()};
}
template <typename T>
Matrices<T> outputs_of(const DeformConvParams& p, T* rows) {
  return {rows, p.out_channels, p.group_outputs()};
}
template <typename T>
Matrices<T> weights_of(const DeformConvParams& p, T* rows) {
  return {rows, p.depth(), p.group_outputs() * p.depth()};
}
template <typename T>
Matrices<T> transpose_of(Matrices<T> matrices) {
  matrices.transposed = true;
  return matrices;
}

}  // namespace dcnseg_ops
