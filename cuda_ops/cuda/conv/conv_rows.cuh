// Tensors in the layout of the convolution kernels: rows, [positions][channels], which is the memory order of a
// channels-last tensor. A contiguous tensor goes through a buffer, one range of rows at a time.
#pragma once
#include "cuda/torch_cuda.h"
#include "cuda/transposes.cuh"
namespace dcnseg_ops {

inline Tensor empty_buffer(int64_t numbers, int32_t dtype, const Tensor& like) {
  return empty_dense({numbers}, {1}, dtype, like);
}

struct RowShape {
  int64_t channels, pixels;
  explicit RowShape(const Tensor& t) : channels(t.sizes()[1]), pixels(t.sizes()[2] * t.sizes()[3]) {}
};

#define DCN_RUN_TILES(kernel, range, channels, stream, ...)                                          \
  do {                                                                                               \
    DCN_LAUNCH((kernel), tiles_of((range).count, channels), tile_threads(), 0, stream, __VA_ARGS__); \
    check_cuda(cudaGetLastError(), #kernel);                                                         \
  } while (0)

// A tensor that is read.
template <typename T>
class RowsFrom {
 public:
  // `most`: maximum number of rows at a time.
  RowsFrom(const Tensor& t, int64_t most, cudaStream_t stream)
      : shape_(t),
        from_(t.in<T>()),
        stream_(stream),
        buffered_(row_bytes(t) > 0),
        buffer_(empty_buffer(buffered_ ? most * shape_.channels : 0, t.dtype(), t)) {}
  // Size of the buffer in bytes per row, or 0 if none is needed.
  static int64_t row_bytes(const Tensor& t) {
    return lies_in_rows(t) ? 0 : t.sizes()[1] * static_cast<int64_t>(sizeof(T));
  }
  // The rows of a range of positions over all images, valid until the next call.
  const T* rows(Range range) const {
    if (!buffered_) return from_ + range.first * shape_.channels;
    T* to = buffer_.template out<T>();
    DCN_RUN_TILES((planes_to_rows<T>), range, shape_.channels, stream_, from_, shape_.channels, shape_.pixels, range,
                  to);
    return to;
  }

 private:
  RowShape shape_;
  const T* from_;
  cudaStream_t stream_;
  bool buffered_;
  Tensor buffer_;
};

// A tensor of type T that is written as rows of type A, which are then rounded and copied to their place.
template <typename T, typename A>
class RowsInto {
 public:
  RowsInto(const Tensor& t, int64_t most, cudaStream_t stream)
      : wanted_(t.numel() > 0), tensor_(t), stream_(stream), buffer_(t) {
    if (row_bytes(t) > 0)
      buffer_ = empty_buffer(most * t.sizes()[1], std::is_same_v<T, A> ? t.dtype() : sum_dtype(t), t);
  }
  static int64_t row_bytes(const Tensor& t) {
    if (t.numel() == 0 || (std::is_same_v<T, A> && lies_in_rows(t))) return 0;
    return t.sizes()[1] * static_cast<int64_t>(sizeof(A));
  }
  bool wanted() const { return wanted_; }
  // The rows of a range to write to.
  A* rows(Range range) const {
    A* data = buffer_.template out<A>();
    return row_bytes(tensor_) > 0 ? data : data + range.first * tensor_.sizes()[1];
  }
  A* zeroed_rows(Range range) const {
    const size_t bytes = static_cast<size_t>(range.count * tensor_.sizes()[1]) * sizeof(A);
    check_cuda(cudaMemsetAsync(rows(range), 0, bytes, stream_), "cudaMemsetAsync");
    return rows(range);
  }
  void finish(Range range) const {
    if (row_bytes(tensor_) == 0) return;
    const RowShape shape(tensor_);
    T* to = tensor_.template out<T>();
    if constexpr (!std::is_same_v<T, A>) {
      const int64_t n = range.count * shape.channels;
      if (lies_in_rows(tensor_)) {
        DCN_RUN((round_values<T, A>), n, stream_, rows(range), n, to + range.first * shape.channels);
        return;
      }
    }
    DCN_RUN_TILES((rows_to_planes<A, T>), range, shape.channels, stream_, rows(range), shape.channels, shape.pixels,
                  range, to);
  }

 private:
  bool wanted_;
  Tensor tensor_;
  cudaStream_t stream_;
  Tensor buffer_;
};

}  // namespace dcnseg_ops
