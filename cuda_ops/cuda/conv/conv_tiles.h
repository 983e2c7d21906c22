// Division of the work of a convolution, such that its memory in addition to input, output and gradients is below 64
// MiB and the columns of a tile fit in the L2 cache. Independent of torch.
#pragma once
#include <algorithm>
#include "deform_conv_params.h"
namespace dcnseg_ops {

#ifdef DCN_LITTLE_MEMORY  // so that tests divide small convolutions into many parts
constexpr int64_t kWorkspace = 16 << 10, kImageBytes = 4 << 10, kMinTile = 1 << 10, kTileStep = 8;
#else
constexpr int64_t kWorkspace = 60 << 20;   // of all buffers together; an allocator may round it up
constexpr int64_t kImageBytes = 24 << 20;  // of images that are copied or summed in a buffer
constexpr int64_t kMinTile = 8 << 20;      // of columns, regardless of the other buffers
constexpr int64_t kTileStep = 128;         // positions: block size of the library's GEMM
#endif

// Sizes of the buffers in bytes: per image copied or summed, per position of a tile, and constant.
struct BufferBytes {
  int64_t image, position, fixed;
};

struct Cut {
  int64_t images;     // processed at a time
  int64_t positions;  // per tile, over these images
};

inline Cut cut_of(const DeformConvParams& p, const BufferBytes& bytes, int64_t cache_bytes) {
  Cut cut;
  const int64_t fit = bytes.image == 0 ? p.batch : kImageBytes / bytes.image;
  cut.images = std::max<int64_t>(std::min(fit, p.batch), 1);
  const int64_t room = std::max(kWorkspace - bytes.fixed - cut.images * bytes.image, kMinTile);
  // Half of the L2 cache, at most 24 MiB: the rest is needed for the inputs and outputs of the columns.
  const int64_t tile_bytes = std::min({cache_bytes / 2, int64_t(24) << 20, room});
  const int64_t most = std::max(tile_bytes / bytes.position / kTileStep * kTileStep, kTileStep);
  const int64_t all = cut.images * p.out_pixels(), tiles = std::max<int64_t>((all + most - 1) / most, 1);
  const int64_t even = (all + tiles - 1) / tiles;  // all tiles of a similar size, without a small last one
  cut.positions = std::min((even + kTileStep - 1) / kTileStep * kTileStep, all);
  return cut;
}

// f(first image, number of images) until all images are processed.
template <typename F>
void for_images(const DeformConvParams& p, const Cut& cut, const F& f) {
  for (int64_t first = 0; first < p.batch; first += cut.images) f(first, std::min(cut.images, p.batch - first));
}

// f(first position, number of positions) for all tiles of some images.
template <typename F>
void for_tiles(const DeformConvParams& p, const Cut& cut, int64_t images, const F& f) {
  const int64_t all = images * p.out_pixels();
  for (int64_t first = 0; first < all; first += cut.positions) f(first, std::min(cut.positions, all - first));
}

}  // namespace dcnseg_ops
