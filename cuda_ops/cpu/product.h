// Products of row-major matrices with packed panels, on one thread, by the microkernel.
//
// The right matrix [depth][columns] is cut into panels of the microkernel's width; each lies [depth][width],
// the last one filled up with zeros. Panel after panel is multiplied with all rows, which stay in the second
// cache; meanwhile the next panel comes there, too.
#pragma once
#include "layout.h"
#include "microkernel.h"
namespace dcnseg_ops {

// How a right matrix lies in memory.
template <typename E>
struct Panels {
  int64_t depth, columns;

  static int64_t width() { return microkernel<E>().width; }
  static int width_log2() { return __builtin_ctz(static_cast<unsigned>(microkernel<E>().width)); }
  int64_t padded_depth() const { return microkernel<E>().has_pairs ? round_up(depth, 2) : depth; }
  int64_t count() const { return (columns + width() - 1) / width(); }
  int64_t panel_size() const { return padded_depth() * width(); }
  int64_t size() const { return count() * panel_size(); }
};

// The columns of c [rows][panels.columns] that b makes, which is panel number `panel` of the right matrix:
// c = or += a [rows][panels.depth] * b. For pairs, a row of `a` with an odd depth has one number more, which is finite.
// `next`: the panel that is multiplied next, or null.
template <typename E>
void multiply_panel(const E* a, int64_t a_stride, int64_t rows, const E* b, const E* next, Panels<E> panels,
                    int64_t panel, AccOf<E>* c, int64_t c_stride, bool accumulate) {
  const Microkernel<E>& kernel = microkernel<E>();
  const int64_t width = kernel.width, columns = std::min(width, panels.columns - panel * width);
  alignas(64) AccOf<E> edge[kMostTileRows * 32];
  for (int64_t row = 0; row < rows; row += kernel.rows) {
    const int64_t n = std::min<int64_t>(kernel.rows, rows - row);
    const E* left = a + row * a_stride;
    const int64_t fetched = row / kernel.rows * kernel.fetched(panels.padded_depth());
    const E* fetch = next && fetched < panels.panel_size() ? next + fetched : b;  // which is in the cache
    AccOf<E>* out = c + row * c_stride + panel * width;
    if (columns == width) {
      kernel.run[n](left, a_stride, b, panels.padded_depth(), out, c_stride, accumulate, fetch);
      continue;
    }
    kernel.run[n](left, a_stride, b, panels.padded_depth(), edge, width, false, fetch);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < columns; ++j)
        out[i * c_stride + j] = edge[i * width + j] + (accumulate ? out[i * c_stride + j] : AccOf<E>(0));
  }
}

// All columns; the panels are `b_stride` apart.
template <typename E>
void multiply(const E* a, int64_t a_stride, int64_t rows, const E* b, int64_t b_stride, Panels<E> panels, AccOf<E>* c,
              int64_t c_stride, bool accumulate) {
  for (int64_t panel = 0; panel < panels.count(); ++panel, b += b_stride) {
    const E* next = panel + 1 < panels.count() ? b + b_stride : nullptr;
    multiply_panel(a, a_stride, rows, b, next, panels, panel, c, c_stride, accumulate);
  }
}

}  // namespace dcnseg_ops
