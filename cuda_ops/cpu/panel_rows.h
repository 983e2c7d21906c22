// Rows put into the panels of a product's right matrix as they are made.
#pragma once
#include "simd.h"
namespace dcnseg_ops {

// Puts the columns of one position into panels [panel][positions][width]; for pairs into [panel][positions /
// 2][width][2], where an even position clears its neighbour's place.
template <typename E>
struct ToPanels {
  E* data;
  int64_t panel_size;
  int width_log2;            // a division takes as long as blending two vectors
  int64_t position, column;  // `column` of channel 0

  DCN_INLINE E* at(int64_t i) const {
    const int64_t k = column + i, panel = k >> width_log2, lane = k & ((int64_t(1) << width_log2) - 1);
    if constexpr (std::is_same_v<E, bf16>)
      return data + panel * panel_size + (((position >> 1) << width_log2) + lane) * 2;
    return data + panel * panel_size + (position << width_log2) + lane;
  }
  DCN_INLINE void put(int64_t i, VecOf<E> v) const {
    constexpr int kLanes = Simd<E>::kLanes;
    const int64_t width = int64_t(1) << width_log2;
    if (((column + i) & (width - 1)) + kLanes > width) {  // over the edge of a panel
      for (int lane = 0; lane < kLanes; ++lane) put_one(i + lane, v[lane]);
      return;
    }
    E* to = at(i);
    if constexpr (std::is_same_v<E, bf16>) {
      u32x16 both = bits_of<f32x16, u32x16>(v, to);
      if (position & 1) {
        u32x16 first;
        __builtin_memcpy(&first, to, sizeof first);
        both = first | both << 16;
      }
      __builtin_memcpy(to, &both, sizeof both);
    } else {
      store(to, v);
    }
  }
  DCN_INLINE void put_one(int64_t i, AccOf<E> v) const {
    E* to = at(i);
    if constexpr (std::is_same_v<E, bf16>) {
      if ((position & 1) == 0) to[1] = E{};
      to += position & 1;
    }
    store_one(to, v);
  }
};

}  // namespace dcnseg_ops
