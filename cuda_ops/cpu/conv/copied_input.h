// A copy of an input that is not channels-last, in which the channels of a pixel are contiguous.
#pragma once
#include <algorithm>
#include <vector>
#include "cpu/conv/depth_steps.h"
#include "cpu/layout.h"
#include "cpu/parts.h"
#include "cpu/shared_work.h"
#include "cpu/transpose.h"
namespace dcnseg_ops {

// Copies the pixels of one part at a time, by chunks of channels: [chunk][pixels][channels]. Each chunk ends with a
// pixel of zeros. A chunk is copied by the threads that need it first.
template <typename T>
class CopiedInput {
 public:
  // `max_pixels`: maximum number of pixels of a part.
  CopiedInput(const DeformConvParams& p, const Tensor& input, const ChannelChunks& chunks, int64_t max_pixels)
      : p_(p), input_(input.in<T>()), chunks_(chunks) {
    data_.get(chunk_size(max_pixels) * chunk_count());
  }

  // Continues with another part; no thread may still use the current one.
  void start(const Part& part) {
    part_ = part;
    work_ = std::vector<SharedWork>(static_cast<size_t>(chunk_count()));
    piece_ = std::clamp(round_up(part.pixels() / (4 * thread_count()), 16), kMinPiece, kMaxPiece);
  }

  // The view for the sampler; `zeros` is relative to pixel 0, which may be before the copy.
  const T* pixel_0() { return shifted<const T>(data_.get(0), -part_.first_pixel * chunks_.channels); }
  int64_t zeros() const { return part_.last_pixel * chunks_.channels; }
  int64_t chunk_stride() const { return chunk_size(part_.pixels()); }

  // Returns when chunk `chunk` is copied.
  void need(int64_t chunk) {
    const int64_t all = part_.pixels() + 1;  // including the zeros
    work_[static_cast<size_t>(chunk)].need((all + piece_ - 1) / piece_, [&](int64_t i) noexcept {
      copy(chunk, i * piece_, std::min((i + 1) * piece_, all));
    });
  }

 private:
  static constexpr int64_t kMinPiece = 16, kMaxPiece = 128;  // pixels

  int64_t chunk_count() const { return p_.groups * chunks_.count; }
  int64_t chunk_size(int64_t pixels) const { return (pixels + 1) * chunks_.channels; }

  // Pixels [begin, end) of the part; its last pixel is followed by the zeros.
  void copy(int64_t chunk, int64_t begin, int64_t end) {
    const int64_t pixels = p_.height * p_.width, channel = chunks_.begin(chunk), first = part_.first_pixel;
    T* to = data_.get(0) + chunk * chunk_stride() + begin * chunks_.channels;
    const int64_t last = std::min(first + end, part_.last_pixel);
    for_images(first + begin, last, pixels, [&](int64_t image, int64_t pixel, int64_t n, int64_t before) {
      transpose_block(input_ + (image * p_.channels + channel) * pixels + pixel, pixels, to + before * chunks_.channels,
                      chunks_.channels, chunks_.end(chunk) - channel, n);
    });
    if (end > part_.pixels()) std::fill_n(to + (part_.pixels() - begin) * chunks_.channels, chunks_.channels, T{});
  }

  const DeformConvParams& p_;
  const T* input_;
  const ChannelChunks chunks_;
  Part part_{};
  int64_t piece_ = kMaxPiece;     // number of pixels copied at a time
  std::vector<SharedWork> work_;  // per chunk
  Buffer<T> data_;
};

}  // namespace dcnseg_ops
