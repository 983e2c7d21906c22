// The gradient of the output as left matrices of GEMMs.
#pragma once
#include "cpu/layout.h"
#include "cpu/parts.h"
#include "cpu/transpose.h"
namespace dcnseg_ops {

// Gradient rows of a block as left matrices: [positions][outputs of the group], and transposed.
template <typename T, typename E>
class GradientRows {
 public:
  GradientRows(const DeformConvParams& p, const Tensor& grad, int64_t block)
      : p_(p),
        from_(grad.in<T>()),
        s_(grad),
        is_channels_last_(is_channels_last(grad)),
        are_planes_((s_.s[3] == 1 || p.out_width == 1) && (s_.s[2] == p.out_width || p.out_height == 1)),
        row_size_(round_up(p.group_outputs(), 16) + 16),
        column_size_(round_up(block, 16) + 16),
        block_(block) {}

  void make(int64_t begin, int64_t end, int64_t group, bool transposed_wanted) {
    const int64_t outputs = p_.group_outputs(), n = end - begin;
    constexpr bool kPairs = std::is_same_v<E, bf16>;
    if (std::is_same_v<T, E> && is_channels_last_ && (!kPairs || outputs % 2 == 0)) {
      rows = reinterpret_cast<const E*>(from_) + begin * p_.out_channels + group * outputs;
      row_stride = p_.out_channels;
    } else {
      E* to = rows_buffer_.get(block_ * row_size_);
      copy_rows(begin, end, group, to);
      if (kPairs && outputs % 2)
        for (int64_t j = 0; j < n; ++j) to[j * row_size_ + outputs] = E{};
      rows = to;
      row_stride = row_size_;
    }
    if (!transposed_wanted) return;
    const int64_t image = begin / p_.out_pixels();
    if (std::is_same_v<T, E> && are_planes_ && (end - 1) / p_.out_pixels() == image && (!kPairs || n % 2 == 0)) {
      columns =
          reinterpret_cast<const E*>(from_) + image * s_.s[0] + group * outputs * s_.s[1] + begin % p_.out_pixels();
      column_stride = s_.s[1];
      return;
    }
    E* to = columns_buffer_.get(outputs * column_size_);
    transpose_block(rows, row_stride, to, column_size_, n, outputs);
    if (kPairs && n % 2)
      for (int64_t o = 0; o < outputs; ++o) to[o * column_size_ + n] = E{};
    columns = to;
    column_stride = column_size_;
  }

  const E *rows = nullptr, *columns = nullptr;
  int64_t row_stride = 0, column_stride = 0;

 private:
  void copy_rows(int64_t begin, int64_t end, int64_t group, E* to) const {
    const int64_t outputs = p_.group_outputs(), pixels = p_.out_pixels();
    for_images(begin, end, pixels, [&](int64_t image, int64_t pixel, int64_t n, int64_t before) {
      const T* planes = from_ + image * s_.s[0] + group * outputs * s_.s[1];
      E* rows_to = to + before * row_size_;
      if constexpr (std::is_same_v<T, E>)
        if (are_planes_) return transpose_block(planes + pixel, s_.s[1], rows_to, row_size_, outputs, n);
      for (int64_t j = 0; j < n; ++j) {
        const T* source = planes + (pixel + j) / p_.out_width * s_.s[2] + (pixel + j) % p_.out_width * s_.s[3];
        for (int64_t o = 0; o < outputs; ++o)
          store_one(rows_to + j * row_size_ + o, static_cast<AccOf<E>>(load_one(source + o * s_.s[1])));
      }
    });
  }

  const DeformConvParams& p_;
  const T* from_;
  Strides4 s_;
  bool is_channels_last_, are_planes_;
  int64_t row_size_, column_size_, block_;
  Buffer<E> rows_buffer_, columns_buffer_;
};

}  // namespace dcnseg_ops
