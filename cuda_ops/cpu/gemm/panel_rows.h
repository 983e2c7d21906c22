// Rows written to the panels of the right matrix of a GEMM.
#pragma once
#include "cpu/simd.h"
namespace dcnseg_ops {

// A run of elements of one position in one panel; `row` is the address of the first one. For pairs, an even position
// clears the elements of its neighbor.
template <typename E>
struct ToPanel {
  E* row;
  bool is_second;  // of a pair

  DCN_INLINE void put(int64_t i, VecOf<E> v) const {
    if constexpr (std::is_same_v<E, bf16>) {
      E* to = row + 2 * i;
      u32x16 both = bits_of<f32x16, u32x16>(v, to);
      if (is_second) {
        u32x16 first;
        __builtin_memcpy(&first, to, sizeof first);
        both = first | both << 16;
      }
      __builtin_memcpy(to, &both, sizeof both);
    } else {
      store(row + i, v);
    }
  }
  DCN_INLINE void put_one(int64_t i, AccOf<E> v) const {
    if constexpr (std::is_same_v<E, bf16>) {
      E* to = row + 2 * i;
      if (!is_second) to[1] = E{};
      store_one(to + is_second, v);
    } else {
      store_one(row + i, v);
    }
  }
};

// Panels [panel][positions][width], for pairs [panel][positions / 2][width][2].
template <typename E>
struct PanelRows {
  E* data;
  int64_t panel_size;
  int width_log2;  // for a shift: a division takes as long as blending two vectors

  // put(i, count, place) for each run of columns [column, column + n) of a position, from column + i on.
  template <typename Put>
  DCN_INLINE void for_runs(int64_t position, int64_t column, int64_t n, const Put& put) const {
    constexpr int kPair = std::is_same_v<E, bf16> ? 2 : 1;
    const int64_t width = int64_t(1) << width_log2;
    for (int64_t i = 0, count; i < n; i += count) {
      const int64_t panel = (column + i) >> width_log2, lane = (column + i) & (width - 1);
      count = width - lane < n - i ? width - lane : n - i;
      E* row = data + panel * panel_size + ((position / kPair << width_log2) + lane) * kPair;
      put(i, count, ToPanel<E>{row, kPair == 2 && position % 2 == 1});
    }
  }
};

}  // namespace dcnseg_ops
