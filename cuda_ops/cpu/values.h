// Whole arrays at a time: sums, rounding.
#pragma once
#include <algorithm>
#include "layout.h"
#include "simd.h"
namespace dcnseg_ops {

// values[i][j] += bias[j]
template <typename T>
DCN_CLONES void add_bias_to_rows(AccOf<T>* values, int64_t rows, int64_t columns, const T* bias) {
  for (int64_t i = 0; i < rows; ++i, values += columns)
    for (int64_t j = 0; j < columns; ++j) values[j] += load_one(bias + j);
}

// to = from, rounded to another type.
template <typename F, typename T>
DCN_CLONES void convert_values(const F* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) store_one(to + i, static_cast<AccOf<T>>(load_one(from + i)));
}

template <typename A, typename T>
DCN_CLONES void add_converted(const A* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) store_one(to + i, load_one(to + i) + from[i]);
}

template <typename A>
DCN_CLONES void add_values(const A* from, int64_t count, A* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

}  // namespace dcnseg_ops
