// Division of the positions into parts, each with the range of input pixels that it samples.
//
// An input that has to be copied, or whose gradient has to be summed in a buffer, is processed part by part, which
// bounds the memory at any image size. Offsets are usually a few pixels, so that the pixels of a part are a band of
// rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>
#include "cpu/conv/tap_plans.h"
namespace dcnseg_ops {

#if defined(DCN_LITTLE_MEMORY)  // set by a test build, in which small cases reach the limits
constexpr int64_t kMaxCopies = 2 << 10, kMinCopies = 1, kMaxSums = 2 << 10;
#else
constexpr int64_t kMaxCopies = 16 << 20;  // bytes
constexpr int64_t kMinCopies = 1 << 20;   // per thread
constexpr int64_t kMaxSums = 4 << 20;
#endif

struct Part {
  int64_t begin, end;               // positions
  int64_t first_pixel, last_pixel;  // indices over all images

  int64_t pixels() const { return last_pixel - first_pixel; }
};

struct Parts {
  std::vector<Part> parts;
  bool overlap = false;  // whether pixels belong to several parts

  int64_t max_pixels() const {
    int64_t most = 0;
    for (const Part& part : parts) most = std::max(most, part.pixels());
    return most;
  }
};

struct RowRange {
  int64_t begin, end;
};

// Rows of the input that one row of output positions samples.
template <typename A>
RowRange sampled_rows(const DeformConvParams& p, const Planes<A>& offset, int64_t image, int64_t row) {
  A low = A(p.height), high = A(-2);
  for (int64_t g = 0; g < p.offset_groups; ++g)
    for (int64_t t = 0; t < p.taps(); ++t) {
      const A* from = offset.data + image * offset.batch + 2 * (g * p.taps() + t) * offset.channel + row * offset.row;
      const A base = static_cast<A>(row * p.stride_h - p.pad_h + t / p.kernel_w * p.dilation_h);
      for (int64_t x = 0; x < p.out_width; ++x) {
        const A y = base + from[x * offset.column];  // false for NaN
        low = y < low ? y : low;
        high = y > high ? y : high;
      }
    }
  // One more pixel on each side: for the second corner, and for rounding errors of a different summation order.
  const int64_t begin = static_cast<int64_t>(std::floor(std::max(low, A(-2)))) - 1;
  const int64_t end = static_cast<int64_t>(std::floor(std::min(high, A(p.height)))) + 3;
  const int64_t first = std::max<int64_t>(0, std::min(begin, p.height));
  return {first, std::max(first, std::min(end, p.height))};
}

// Parts of at most `max_pixels` pixels: images, or bands of one. Empty if the offsets of a single row of positions
// reach too far.
template <typename A>
Parts parts_of(const DeformConvParams& p, const Planes<A>& offset, int64_t max_pixels) {
  Parts result;
  const int64_t pixels = p.height * p.width;
  if (pixels <= max_pixels) {
    const int64_t images = max_pixels / pixels;
    for (int64_t b = 0; b < p.batch; b += images) {
      const int64_t last = std::min(p.batch, b + images);
      result.parts.push_back({b * p.out_pixels(), last * p.out_pixels(), b * pixels, last * pixels});
    }
    return result;
  }
  result.overlap = true;
  for (int64_t b = 0; b < p.batch; ++b) {
    RowRange band{0, 0};
    int64_t first_row = 0;
    const auto finish = [&](int64_t row) {
      result.parts.push_back({b * p.out_pixels() + first_row * p.out_width, b * p.out_pixels() + row * p.out_width,
                              b * pixels + band.begin * p.width, b * pixels + band.end * p.width});
    };
    for (int64_t row = 0; row < p.out_height; ++row) {
      const RowRange rows = sampled_rows(p, offset, b, row);
      if ((rows.end - rows.begin) * p.width > max_pixels) return {};
      RowRange both{std::min(band.begin, rows.begin), std::max(band.end, rows.end)};
      if (row == first_row) both = rows;
      if ((both.end - both.begin) * p.width > max_pixels) {
        finish(row);
        first_row = row;
        both = rows;
      }
      band = both;
    }
    finish(p.out_height);
  }
  return result;
}

// Splits pixels [begin, end) at image boundaries: f(image, first pixel of the image, count, number of pixels before).
template <typename F>
void for_images(int64_t begin, int64_t end, int64_t pixels, const F& f) {
  for (int64_t at = begin; at < end;) {
    const int64_t n = std::min(end - at, pixels - at % pixels);
    f(at / pixels, at % pixels, n, at - begin);
    at += n;
  }
}

}  // namespace dcnseg_ops
