// Memory formats and threads.
#pragma once
#include <algorithm>
#include <mutex>
#include <string>
#include "cpu/scratch.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"
#include "torch_c_abi.h"
namespace dcnseg_ops {

struct Strides4 {
  int64_t s[4];
  explicit Strides4(const Tensor& t) {
    for (int i = 0; i < 4; ++i) s[i] = t.strides()[i];
  }
};

// Whether a [n0, n1, n2, n3] tensor is dense in the order [n0, n2, n3, n1].
inline bool is_channels_last(const Tensor& t) {
  if (t.numel() == 0) return true;
  const int64_t *n = t.sizes(), *s = t.strides();
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (n[d] != 1 && s[d] != expected) return false;
    expected *= n[d];
  }
  return true;
}

inline bool is_contiguous(const Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (t.sizes()[d] != 1 && t.strides()[d] != expected) return false;
    expected *= t.sizes()[d];
  }
  return true;
}

inline std::vector<int64_t> channels_last_strides(const std::vector<int64_t>& n) {
  return {n[1] * n[2] * n[3], 1, n[3] * n[1], n[1]};
}

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// A pointer that may be out of bounds until an offset is added.
template <typename T>
T* shifted(T* p, int64_t count) {
  return reinterpret_cast<T*>(reinterpret_cast<intptr_t>(p) + count * static_cast<int64_t>(sizeof(T)));
}

// Minimum number of elements per thread.
inline int64_t grain(int64_t elements_per_item) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_item));
}

// parallel_for over [0, count) for functions that may throw: no exception may leave a parallel region.
template <typename F>
void parallel_ranges(int64_t count, int64_t grain, const F& f) {
  std::mutex mutex;
  std::string error;
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (const std::exception& e) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = e.what();
    }
  });
  DCN_CHECK(error.empty(), error);
}

// f(i) for each i < count, each on its own thread if there are several.
template <typename F>
void for_slots(int64_t count, const F& f) {
  if (count == 1) return f(0);
  parallel_ranges(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace dcnseg_ops
