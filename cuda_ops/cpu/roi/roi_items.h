// Division of the work of the RoI operators on the CPU, and copies of parts of a map.
//
// A work item is one image and a chunk of channels, so that no element is written by two threads and every sum has a
// fixed order. Boxes are grouped by image and keep their order.
//
// A channels-last map is read and written in place. Of a contiguous map, a chunk of channels is copied to
// channels-last (a slab) if the boxes read enough of it and the slab is small enough; otherwise its planes are read
// with strides. Position-sensitive operators, in which every bin has its own channels, always use strides.
#pragma once
#include <algorithm>
#include "cpu/layout.h"
#include "cpu/roi/roi_average_loops.h"
#include "cpu/transpose.h"
namespace dcnseg_ops {

constexpr int64_t kMaxBytes = 32 << 20;  // of all slabs or all sums together
constexpr int64_t kMaxSlab = 8 << 20;    // limit for a slab of kMin channels
constexpr int64_t kGoodSlab = 4 << 20;   // fits in a cache
constexpr int64_t kMin = 16, kMax = 64;
constexpr int64_t kGrouped = 256;  // channels per chunk if bins have their own channels

// Channels per chunk such that a slab of `pixels` pixels fits in a cache.
inline int64_t chunk_channels(int64_t pixels, int64_t element_bytes) {
  const int64_t fitting = kGoodSlab / std::max<int64_t>(1, pixels * element_bytes);
  return std::max(kMin, std::min(kMax, fitting / kMin * kMin));
}

// f(begin, end) for ranges of [0, count), each on its own thread if there are several. An exception may not leave a
// parallel region and is rethrown here.
template <typename F>
void for_ranges(int64_t count, int64_t max_ranges, const F& f) {
  const int64_t ranges = std::min({count, max_ranges, thread_count()});
  if (count <= 0) return;
  if (ranges <= 1) return f(0, count);
  for_slots(ranges, [&](int64_t i) { f(i * count / ranges, (i + 1) * count / ranges); });
}

// The indices of the boxes of each image; those of invalid boxes are at `batch`.
struct BoxesByImage {
  std::vector<int64_t> boxes, first;

  template <typename Source>
  BoxesByImage(const Source& source, const RoiShape& p) : first(static_cast<size_t>(p.batch + 2)) {
    const auto image = [&](int64_t r) { return source.image(r) < 0 ? p.batch : source.image(r); };
    for (int64_t r = 0; r < p.rois; ++r) ++first[image(r) + 1];
    for (int64_t b = 0; b <= p.batch; ++b) first[b + 1] += first[b];
    boxes.resize(static_cast<size_t>(p.rois));
    std::vector<int64_t> next(first);
    for (int64_t r = 0; r < p.rois; ++r) boxes[next[image(r)]++] = r;
  }
  const int64_t* begin(int64_t image) const { return boxes.data() + first[image]; }
  const int64_t* end(int64_t image) const { return boxes.data() + first[image + 1]; }
};

// Whether the boxes of an image read enough of a map to make a copy worthwhile.
template <typename Source>
bool is_read_often(const Source& source, const RoiShape& p, const BoxesByImage& by_image, int64_t image) {
  double reads = 0;
  for (const int64_t* r = by_image.begin(image); r != by_image.end(image); ++r) reads += source.reads(*r);
  return reads > 0.5 * double(p.pixels());
}

// A work item: some boxes of an image (indices into BoxesByImage::boxes), and output channels [begin, end).
struct Piece {
  int64_t image, begin, end, first_box, end_box;
  bool uses_slab;
};

// The chunks of the output channels, the same for all images.
struct Chunks {
  int64_t channels;
  bool may_use_slab;

  int64_t count(const RoiShape& p) const { return (p.outputs() + channels - 1) / channels; }
};
// For operators that read the input, which are also divided by boxes. Independent of the number of threads, and so are
// sums over chunks.
inline Chunks reading_chunks(const RoiShape& p, bool channels_last, int64_t element_bytes) {
  if (p.cells() > 1) return {std::max<int64_t>(1, kGrouped / p.cells()), false};
  if (channels_last) return {std::max<int64_t>(1, p.channels), false};
  return {chunk_channels(p.pixels(), element_bytes), p.pixels() * kMin * element_bytes <= kMaxSlab};
}

// For operators that add to the gradient of the input. A channels-last gradient is divided only for the threads:
// writing a chunk of each pixel is inefficient.
inline Chunks adding_chunks(const RoiShape& p, bool channels_last, int64_t sum_bytes) {
  if (p.cells() == 1 && !channels_last) return reading_chunks(p, channels_last, sum_bytes);
  const int64_t share = (p.outputs() + thread_count() - 1) / thread_count();
  if (p.cells() > 1) return {std::max<int64_t>(1, std::min(share, kGrouped / p.cells())), false};
  return {std::max<int64_t>(1, (share + kMin - 1) / kMin) * kMin, false};
}

// All work items. Those that add to the gradient of the input are not divided by boxes, because boxes share pixels;
// those that read the input are, and include invalid boxes (image `batch`).
template <typename Source>
std::vector<Piece> list_pieces(const RoiShape& p, const Source& source, const BoxesByImage& by_image,
                               const Chunks& chunks, bool is_reading) {
  constexpr int64_t kBoxes = 16;
  std::vector<Piece> pieces;
  for (int64_t image = 0; image < p.batch + (is_reading ? 1 : 0); ++image) {
    const int64_t first = by_image.first[image], count = by_image.first[image + 1] - first;
    if (is_reading && count == 0) continue;
    const bool uses_slab = chunks.may_use_slab && image < p.batch && is_read_often(source, p, by_image, image);
    const int64_t boxes = is_reading && !uses_slab ? kBoxes : std::max<int64_t>(1, count);
    for (int64_t begin = 0; begin < p.outputs(); begin += chunks.channels)
      for (int64_t box = 0; box < std::max<int64_t>(1, count); box += boxes)
        pieces.push_back({image, begin, std::min(p.outputs(), begin + chunks.channels), first + box,
                          first + std::min(count, box + boxes), uses_slab});
  }
  return pieces;
}

// Number of threads that may have their own slab.
inline int64_t max_threads(const RoiShape& p, const std::vector<Piece>& pieces, int64_t element_bytes) {
  int64_t most = 1;
  for (const Piece& piece : pieces)
    if (piece.uses_slab) most = std::max(most, (piece.end - piece.begin) * p.pixels() * element_bytes);
  return std::max<int64_t>(1, kMaxBytes / most);
}

template <typename T>
Pixels<T> image_of(T* data, bool channels_last, const RoiShape& p, int64_t image) {
  T* first = data + image * p.channels * p.pixels();
  if (channels_last) return {first, 1, p.channels, p.width};
  return {first, p.pixels(), 1, p.width};
}

// The input of a work item; its channel 0 is the first one of the item.
template <typename T>
Pixels<const T> input_of(const RoiShape& p, const Piece& piece, const T* input, bool channels_last, Buffer<T>& slab) {
  Pixels<const T> in = image_of(input, channels_last, p, piece.image);
  in.data = in.at(piece.begin * p.cells(), 0, 0);
  if (!piece.uses_slab || channels_last) return in;
  const int64_t n = piece.end - piece.begin;
  T* to = slab.get(n * p.pixels());
  transpose_block(in.data, p.pixels(), to, n, n, p.pixels());
  return {to, 1, n, p.width};
}

// A gradient [R, C, kh, kw] with any strides.
template <typename T>
struct GradView {
  const T* data;
  Strides4 s;
  int64_t kh, kw;

  const T* at(int64_t r, int64_t c, int64_t bin) const { return data + r * s.s[0] + c * s.s[1] + bin_offset(bin); }
  // Whether the bins of a channel are contiguous.
  bool is_run() const { return (kw == 1 || s.s[3] == 1) && (kh == 1 || s.s[2] == kw); }
  int64_t bin_offset(int64_t bin) const { return bin / kw * s.s[2] + bin % kw * s.s[3]; }
  // Channels [c, c + n) of all bins as [bins][n].
  void copy(int64_t r, int64_t c, int64_t n, T* to) const {
    if (is_run()) {
      transpose_block(at(r, c, 0), s.s[1], to, n, n, kh * kw);
      return;
    }
    for (int64_t bin = 0; bin < kh * kw; ++bin)
      for (int64_t i = 0; i < n; ++i) to[bin * n + i] = *at(r, c + i, bin);
  }
};

// The sums of a work item and their conversion to the gradient of the input. Either the gradient itself, or a buffer
// for a band of rows at a time, which limits the memory for large maps.
template <typename T>
class InputSums {
  using A = AccOf<T>;

 public:
  InputSums(const RoiShape& p, T* grad, bool channels_last, const Piece& piece, bool uses_slab, Buffer<A>& sums,
            Buffer<T>& strip)
      : p_(p),
        grad_(image_of(grad, channels_last, p, piece.image)),
        n_((piece.end - piece.begin) * p.cells()),
        channels_last_(channels_last),
        is_direct_(std::is_same_v<T, A> && !uses_slab),
        is_interleaved_(channels_last || uses_slab),
        strip_(strip) {
    grad_.data = grad_.at(piece.begin * p.cells(), 0, 0);
    if (is_direct_) return;
    const int64_t row_bytes = p.width * n_ * static_cast<int64_t>(sizeof(A));
    // Bands do not change the order of sums, so that their height may depend on the number of threads.
    const int64_t max_bytes = std::min(kMaxSlab, kMaxBytes / 2 / thread_count());
    rows_ = std::max<int64_t>(1, std::min(p.height, max_bytes / row_bytes));
    sums_ = sums.get(rows_ * p.width * n_);
  }

  // Calls f(sums, first row, end row) for bands of rows that cover the map. Channel 0 of the sums is the first one of
  // the item, row 0 the first one of the band.
  template <typename F>
  void for_bands(const F& f) {
    if constexpr (std::is_same_v<T, A>)
      if (is_direct_) {
        clear();
        return f(grad_, int64_t(0), p_.height);
      }
    for (int64_t row = 0; row < p_.height; row += rows_) {
      const int64_t end = std::min(p_.height, row + rows_), pixels = (end - row) * p_.width;
      std::fill(sums_, sums_ + pixels * n_, A(0));
      f(is_interleaved_ ? Pixels<A>{sums_, 1, n_, p_.width} : Pixels<A>{sums_, pixels, 1, p_.width}, row, end);
      for (int64_t first = 0; first < pixels; first += kStrip)
        write(row, pixels, first, std::min(kStrip, pixels - first));
    }
  }
  void clear() {
    if (channels_last_ && n_ != p_.channels)
      for (int64_t i = 0; i < p_.pixels(); ++i) std::fill_n(grad_.data + i * p_.channels, n_, T{});
    else
      std::fill_n(grad_.data, p_.pixels() * n_, T{});
  }

 private:
  static constexpr int64_t kStrip = 256;  // pixels

  // Pixels [first, first + count) of the band to the gradient.
  void write(int64_t row, int64_t pixels, int64_t first, int64_t count) {
    T* to = grad_.at(0, row, first);
    const A* from = sums_ + first * (is_interleaved_ ? n_ : 1);
    if (!is_interleaved_) {
      for (int64_t c = 0; c < n_; ++c) round(from + c * pixels, count, to + c * grad_.channel);
    } else if (channels_last_) {
      for (int64_t i = 0; i < count; ++i) round(from + i * n_, n_, to + i * grad_.pixel);
    } else if constexpr (std::is_same_v<T, A>) {
      transpose_block(from, n_, to, grad_.channel, count, n_);
    } else {
      T* rounded = strip_.get(kStrip * n_);
      round(from, count * n_, rounded);
      transpose_block(rounded, n_, to, grad_.channel, count, n_);
    }
  }
  static void round(const A* from, int64_t count, T* to) {
    for (int64_t i = 0; i < count; ++i) store_one(to + i, from[i]);
  }

  const RoiShape& p_;
  Pixels<T> grad_;
  int64_t n_, rows_ = 0;
  bool channels_last_, is_direct_, is_interleaved_;
  A* sums_ = nullptr;
  Buffer<T>& strip_;
};

}  // namespace dcnseg_ops
