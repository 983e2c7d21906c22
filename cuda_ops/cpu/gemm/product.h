// Single-threaded GEMM of row-major matrices with packed panels.
//
// The right matrix [depth][columns] is divided into panels of the width of a microkernel, each [depth][width], the
// last one padded with zeros. Each panel is multiplied by all rows, which stay in the L2 cache, while the next panel
// is prefetched into it.
#pragma once
#include "cpu/gemm/microkernel.h"
#include "cpu/layout.h"
namespace dcnseg_ops {

// Number of rows of a panel, rounded up to even for pairs.
template <typename E>
int64_t padded_depth(int64_t depth) {
  return microkernel<E>().has_pairs ? round_up(depth, 2) : depth;
}

// Layout of a right matrix.
template <typename E>
struct Panels {
  int64_t depth, columns;

  static int64_t width() { return microkernel<E>().width; }
  static int width_log2() { return __builtin_ctz(static_cast<unsigned>(microkernel<E>().width)); }
  int64_t count() const { return (columns + width() - 1) / width(); }
  int64_t panel_size() const { return padded_depth<E>(depth) * width(); }
  int64_t size() const { return count() * panel_size(); }
};

// c [rows][columns] = or += a [rows][depth] * b [depth][kernel.width], a panel whose remaining columns are zero. For
// pairs, a row of `a` with an odd depth has one more element, which must be finite. `next`: the panel that is
// multiplied next, and its number of elements to prefetch.
template <typename E>
void multiply_panel(const Microkernel<E>& kernel, const E* a, int64_t a_stride, int64_t rows, const E* b, int64_t depth,
                    int64_t columns, const E* next, int64_t next_size, AccOf<E>* c, int64_t c_stride, bool accumulate) {
  const int64_t width = kernel.width, padded = padded_depth<E>(depth);
  alignas(64) AccOf<E> edge[kMaxTile];
  for (int64_t row = 0; row < rows; row += kernel.rows) {
    const int64_t n = std::min<int64_t>(kernel.rows, rows - row);
    const E* left = a + row * a_stride;
    const int64_t fetched = row / kernel.rows * kernel.fetched(padded);
    const E* fetch = fetched < next_size ? next + fetched : b;  // which is in the cache
    AccOf<E>* out = c + row * c_stride;
    if (columns == width) {
      kernel.run[n](left, a_stride, b, padded, out, c_stride, accumulate, fetch);
      continue;
    }
    kernel.run[n](left, a_stride, b, padded, edge, width, false, fetch);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < columns; ++j)
        out[i * c_stride + j] = edge[i * width + j] + (accumulate ? out[i * c_stride + j] : AccOf<E>(0));
  }
}

// All columns; the stride between panels is `b_stride`.
template <typename E>
void multiply(const E* a, int64_t a_stride, int64_t rows, const E* b, int64_t b_stride, Panels<E> panels, AccOf<E>* c,
              int64_t c_stride, bool accumulate) {
  const int64_t width = Panels<E>::width();
  for (int64_t panel = 0; panel < panels.count(); ++panel, b += b_stride) {
    const bool is_last = panel + 1 == panels.count();
    multiply_panel(microkernel<E>(), a, a_stride, rows, b, panels.depth,
                   std::min(width, panels.columns - panel * width), b + b_stride, is_last ? 0 : panels.panel_size(),
                   c + panel * width, c_stride, accumulate);
  }
}

}  // namespace dcnseg_ops
