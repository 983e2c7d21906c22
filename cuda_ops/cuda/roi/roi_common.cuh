// Shared by the RoI kernels: sizes of a pooling, layouts, and the bins of a box.
//
// All indices have 64 bits, except for pixels of one map: row * width + column fits in 32 bits. Boxes are values on
// the device that the host has not checked: everything that is used as an index is clamped or checked here.
#pragma once
#include "cuda/kernel_common.cuh"
namespace dcnseg_ops {

// Strides of a dense [N, C, H, W] tensor, whose rows and columns are one axis: pixels or bins.
struct Layout {
  int64_t image, channel, pixel;

  DCN_HD int64_t at(int64_t n, int64_t c, int64_t i) const { return n * image + c * channel + i * pixel; }
};

inline Layout dense_layout(int64_t channels, int64_t pixels, bool channels_last) {
  return channels_last ? Layout{channels * pixels, 1, channels} : Layout{channels * pixels, pixels, 1};
}

struct RoiParams {
  int64_t batch;
  int32_t height, width;  // of the input
  int64_t boxes, out_channels;
  int64_t kernel_h, kernel_w;  // bins of a box
  int64_t group_h, group_w;    // 1 x 1, or the groups of position-sensitive input channels
  Layout input, output;
  bool channels_last;  // of the output

  DCN_HD int64_t bins() const { return kernel_h * kernel_w; }
  DCN_HD int64_t outputs() const { return boxes * out_channels * bins(); }
  DCN_HD int64_t input_channel(int64_t c, int64_t bin) const {
    return (c * group_h + bin / kernel_w * group_h / kernel_h) * group_w + bin % kernel_w * group_w / kernel_w;
  }
};

// Element i of [boxes][channels][bins], or of [boxes][bins][channels] if the output is channels-last, so that reads
// and writes of adjacent threads are coalesced.
struct Place {
  int64_t box, channel, bin;
};

DCN_HD Place place_of(const RoiParams& p, int64_t channels, int64_t i) {
  const int64_t rest = i / (p.channels_last ? channels : p.bins()), inner = i % (p.channels_last ? channels : p.bins());
  return p.channels_last ? Place{rest / p.bins(), inner, rest % p.bins()}
                         : Place{rest / channels, rest % channels, inner};
}

// The pixels of a bin; image is -1 for an invalid box.
struct Window {
  int64_t image;
  int32_t top, bottom, left, right;

  DCN_HD int64_t pixels() const {
    return bottom > top && right > left ? static_cast<int64_t>(bottom - top) * (right - left) : 0;
  }
};

DCN_HD int32_t clamp_to(int32_t v, int32_t most) { return v < 0 ? 0 : v < most ? v : most; }

// `bins` is [boxes][1 + 2 * kernel_h + 2 * kernel_w]: image, begins and ends of rows, of columns.
DCN_HD Window window_of(const RoiParams& p, const int32_t* bins, int64_t box, int64_t bin) {
  const int32_t* row = bins + box * (1 + 2 * p.kernel_h + 2 * p.kernel_w);
  const int32_t *rows = row + 1 + bin / p.kernel_w, *columns = row + 1 + 2 * p.kernel_h + bin % p.kernel_w;
  return {row[0] >= 0 && row[0] < p.batch ? row[0] : -1, clamp_to(rows[0], p.height),
          clamp_to(rows[p.kernel_h], p.height), clamp_to(columns[0], p.width), clamp_to(columns[p.kernel_w], p.width)};
}

}  // namespace dcnseg_ops
