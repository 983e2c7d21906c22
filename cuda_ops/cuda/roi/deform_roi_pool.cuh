// The kernels of deformable RoI pooling, position-sensitive or not. Independent of torch (see kernel_common.cuh).
//
// A bin is sampled on a grid that is displaced by the shift of its class and part: all channels of a class share the
// positions. A thread therefore has one bin and a few channels, and computes each position once. Adjacent threads have
// adjacent bins or, if channels-last, adjacent channels.
//
// Pitfall: the gradient of the input is added with atomics in any order (see roi_pool.cuh). That of the shift has a
// fixed order: one warp sums it, and no element is written by two warps.
#pragma once
#include <math.h>
#include "bilinear.h"
#include "cuda/roi/roi_common.cuh"
#include "roi_samples.h"
namespace dcnseg_ops {

// Maximum per thread. Loops have this fixed length, so that their sums stay in registers.
constexpr int kRoiChannels = 4;

struct DeformRoiParams {
  RoiParams roi;
  int64_t classes, part_h, part_w;  // of the shift, [boxes, 2 * classes, part_h, part_w]
  Border border;

  DCN_HD int64_t class_channels() const { return roi.out_channels / classes; }
  DCN_HD int64_t class_chunks() const { return (class_channels() + kRoiChannels - 1) / kRoiChannels; }
  DCN_HD int64_t chunks() const { return classes * class_chunks(); }
  DCN_HD int64_t part(int64_t bin) const {
    return bin / roi.kernel_w * part_h / roi.kernel_h * part_w + bin % roi.kernel_w * part_w / roi.kernel_w;
  }
  DCN_HD int64_t parts() const { return part_h * part_w; }
};

// From Python, in the type of positions. `samples` is [boxes][1 + 3 * kernel_h + 3 * kernel_w]: image; first, step and
// count of the samples of the rows; of the columns. `shift` may be null.
template <typename A>
struct RoiPositions {
  const A* samples;
  const A* shift;
};

// Without a shift, a border of zeros samples whole pixels (eq. 6 of Dai et al. with zero offsets): a neighbor with
// weight 0, which may be NaN, is not read.
template <typename A>
DCN_HD bool samples_whole_pixels(const DeformRoiParams& d, const RoiPositions<A>& positions) {
  return !positions.shift && d.border == Border::zero;
}

// The samples of one bin that read a pixel.
template <typename A>
struct BinSamples {
  int64_t image;  // -1 for an invalid box
  SampleAxis<A> y, x;
  SampleRange rows, columns;
  A divisor;           // 0 if there are no samples
  bool has_nan_shift;  // shifted by NaN or infinity: the output is NaN and nothing is read

  DCN_HD int64_t width() const { return columns.end - columns.begin; }
  DCN_HD int64_t count() const { return (rows.end - rows.begin) * width(); }
  DCN_HD Bilinear<A> locate_sample(const DeformRoiParams& d, int64_t row, int64_t column) const {
    return locate(d.border, y.at(row), x.at(column), d.roi.height, d.roi.width);
  }
};

template <typename A>
DCN_HD int64_t image_of(const DeformRoiParams& d, const RoiPositions<A>& positions, int64_t box) {
  const A image = positions.samples[box * (1 + 3 * d.roi.kernel_h + 3 * d.roi.kernel_w)];
  return image >= A(0) && image < static_cast<A>(d.roi.batch) ? clamp_index(image, d.roi.batch - 1) : -1;
}

template <typename A>
DCN_HD BinSamples<A> samples_of(const DeformRoiParams& d, const RoiPositions<A>& positions, int64_t box, int64_t klass,
                                int64_t bin) {
  const int64_t kh = d.roi.kernel_h, kw = d.roi.kernel_w;
  const A* box_samples = positions.samples + box * (1 + 3 * kh + 3 * kw);
  const A *ys = box_samples + 1 + bin / kw, *xs = box_samples + 1 + 3 * kh + bin % kw;
  const A* shift = positions.shift;  // x before y
  if (shift) shift += ((box * d.classes + klass) * 2) * d.parts() + d.part(bin);
  BinSamples<A> s{};
  s.image = image_of(d, positions, box);
  s.y = {ys[0], ys[kh], ys[2 * kh], shift ? shift[d.parts()] : A(0)};
  s.x = {xs[0], xs[kw], xs[2 * kw], shift ? shift[0] : A(0)};
  const bool moved_finitely = s.y.shift - s.y.shift == A(0) && s.x.shift - s.x.shift == A(0);
  s.has_nan_shift = !moved_finitely && s.y.count >= A(1) && s.x.count >= A(1);
  if (s.image < 0 || !moved_finitely) return s;
  s.rows = valid_samples(d.border, s.y, d.roi.height);
  s.columns = valid_samples(d.border, s.x, d.roi.width);
  s.divisor = d.border == Border::mxnet ? static_cast<A>(s.count()) : s.y.count * s.x.count;
  return s;
}

// Thread i of a grid over boxes, bins and chunks of channels. The channels of a chunk have a stride of `step`, so that
// in a channels-last tensor adjacent threads read adjacent channels.
struct Chunk {
  Place place;  // of its first channel
  int64_t klass, step;
  int channels;
};

DCN_HD Chunk chunk_of(const DeformRoiParams& d, int64_t i) {
  Chunk chunk{place_of(d.roi, d.chunks(), i), 0, d.class_chunks(), 0};
  const int64_t number = chunk.place.channel, first = number % chunk.step;
  chunk.klass = number / chunk.step;
  chunk.place.channel = chunk.klass * d.class_channels() + first;
  chunk.channels = static_cast<int>((d.class_channels() - first + chunk.step - 1) / chunk.step);
  return chunk;
}

// Stride between the channels of a chunk in the input, in elements.
DCN_HD int64_t channel_step(const RoiParams& p, const Chunk& chunk) {
  return chunk.step * p.group_h * p.group_w * p.input.channel;
}

template <typename T, typename A>
__global__ void deform_roi_forward(DeformRoiParams d, const T* input, RoiPositions<A> positions, int64_t n, T* output) {
  DCN_FOR_EACH(i, n) {
    const Chunk chunk = chunk_of(d, i);
    const Place& place = chunk.place;
    const BinSamples<A> s = samples_of(d, positions, place.box, chunk.klass, place.bin);
    const bool is_whole = samples_whole_pixels(d, positions);
    const int64_t step = channel_step(d.roi, chunk);
    const int64_t origin = d.roi.input.at(s.image, d.roi.input_channel(place.channel, place.bin), 0);
    A sum[kRoiChannels] = {};
    for (int64_t row = s.rows.begin; row < s.rows.end; ++row)
      for (int64_t column = s.columns.begin; column < s.columns.end; ++column) {
        const Bilinear<A> at = s.locate_sample(d, row, column);
        A weight[4];
        corner_weights(at.ly, at.lx, A(1), weight);
        for (int corner = 0; corner < 4; ++corner) {
          if (at.index[corner] == kOutside || (is_whole && weight[corner] == A(0))) continue;
          const int64_t pixel = origin + at.index[corner] * d.roi.input.pixel;
          for (int k = 0; k < kRoiChannels; ++k)
            if (k < chunk.channels) sum[k] += weight[corner] * to_sum(input[pixel + k * step]);
        }
      }
    const bool is_nan = s.image < 0 || s.has_nan_shift;
    for (int k = 0; k < kRoiChannels; ++k) {
      const A mean = is_nan ? A(NAN) : s.divisor > A(0) ? sum[k] / s.divisor : A(0);
      if (k < chunk.channels)
        output[d.roi.output.at(place.box, place.channel + k * chunk.step, place.bin)] = Value<T>::from(mean);
    }
  }
}

// grad has the layout of the output. The threads are those of the forward.
template <typename T, typename A>
__global__ void deform_roi_input_grads(DeformRoiParams d, const T* grad, RoiPositions<A> positions, int64_t n,
                                       A* grad_input) {
  DCN_FOR_EACH(i, n) {
    const Chunk chunk = chunk_of(d, i);
    const Place& place = chunk.place;
    const BinSamples<A> s = samples_of(d, positions, place.box, chunk.klass, place.bin);
    if (s.count() == 0) continue;
    const bool is_whole = samples_whole_pixels(d, positions);
    const int64_t step = channel_step(d.roi, chunk);
    const int64_t origin = d.roi.input.at(s.image, d.roi.input_channel(place.channel, place.bin), 0);
    A share[kRoiChannels] = {};
    for (int k = 0; k < kRoiChannels; ++k)
      if (k < chunk.channels)
        share[k] = to_sum(grad[d.roi.output.at(place.box, place.channel + k * chunk.step, place.bin)]) / s.divisor;
    for (int64_t row = s.rows.begin; row < s.rows.end; ++row)
      for (int64_t column = s.columns.begin; column < s.columns.end; ++column) {
        const Bilinear<A> at = s.locate_sample(d, row, column);
        A weight[4];
        corner_weights(at.ly, at.lx, A(1), weight);
        for (int corner = 0; corner < 4; ++corner) {
          if (at.index[corner] == kOutside || (is_whole && weight[corner] == A(0))) continue;
          const int64_t pixel = origin + at.index[corner] * d.roi.input.pixel;
          for (int k = 0; k < kRoiChannels; ++k)
            if (k < chunk.channels) atomicAdd(grad_input + pixel + k * step, weight[corner] * share[k]);
        }
      }
  }
}

// Division of the work on one shift between the lanes of a warp: lanes iterate over adjacent channels if there are
// enough of them; the remaining lanes iterate over samples.
struct Lane {
  int64_t channel, channels, sample, samples;
};

DCN_HD Lane lane_of(int64_t lane, int64_t class_channels) {
  int64_t channels = 1;
  while (channels < kWarp && channels < class_channels) channels *= 2;
  return {lane % channels, channels, lane / channels, kWarp / channels};
}

// Adds this lane's part of the derivative of a loss with respect to the position (y, x) of a bin.
template <typename T, typename A>
__device__ inline void add_position_grads(const DeformRoiParams& d, const T* grad, const T* input,
                                          const BinSamples<A>& s, const Place& place, const Lane& lane, A total[2]) {
  if (s.count() == 0) return;
  const RoiParams& p = d.roi;
  const int64_t step = p.group_h * p.group_w * p.input.channel;
  const T* map = input + p.input.at(s.image, p.input_channel(place.channel, place.bin), 0);
  const T* grads = grad + p.output.at(place.box, place.channel, place.bin);
  for (int64_t sample = lane.sample; sample < s.count(); sample += lane.samples) {
    const Bilinear<A> at = s.locate_sample(d, s.rows.begin + sample / s.width(), s.columns.begin + sample % s.width());
    A dot[4] = {0, 0, 0, 0};
    for (int64_t c = lane.channel; c < d.class_channels(); c += lane.channels) {
      const A share = to_sum(grads[c * p.output.channel]);
      for (int corner = 0; corner < 4; ++corner)
        if (at.index[corner] != kOutside)
          dot[corner] += share * to_sum(map[c * step + at.index[corner] * p.input.pixel]);
    }
    A grad_y, grad_x, grad_factor;
    position_gradient(dot, at.ly, at.lx, A(1), &grad_y, &grad_x, &grad_factor);
    total[0] += grad_y / s.divisor;
    total[1] += grad_x / s.divisor;
  }
}

// One warp per element of [boxes][classes][parts]: launch kWarp * n threads in blocks of whole warps.
template <typename T, typename A>
__global__ void deform_roi_shift_grads(DeformRoiParams d, const T* grad, const T* input, RoiPositions<A> positions,
                                       int64_t n, A* grad_shift) {
  DCN_FOR_EACH(thread, n * kWarp) {
    const int64_t i = thread / kWarp, part = i % d.parts(), klass = i / d.parts() % d.classes;
    const int64_t box = i / d.parts() / d.classes, part_y = part / d.part_w, part_x = part % d.part_w;
    const Lane lane = lane_of(thread % kWarp, d.class_channels());
    A total[2] = {0, 0};
    // The bins of this part: bin * part_h / kernel_h == part_y.
    const auto first_of = [](int64_t p, int64_t kernel, int64_t parts) { return (p * kernel + parts - 1) / parts; };
    for (int64_t y = first_of(part_y, d.roi.kernel_h, d.part_h); y < first_of(part_y + 1, d.roi.kernel_h, d.part_h);
         ++y)
      for (int64_t x = first_of(part_x, d.roi.kernel_w, d.part_w); x < first_of(part_x + 1, d.roi.kernel_w, d.part_w);
           ++x) {
        const Place place{box, klass * d.class_channels(), y * d.roi.kernel_w + x};
        const BinSamples<A> s = samples_of(d, positions, box, klass, place.bin);
        if (s.has_nan_shift) total[0] = total[1] = A(NAN);
        add_position_grads(d, grad, input, s, place, lane, total);
      }
    if (image_of(d, positions, box) < 0) total[0] = total[1] = A(NAN);
    for (int k = 0; k < 2; ++k)
      for (unsigned distance = kWarp / 2; distance > 0; distance /= 2)
        total[k] += __shfl_down_sync(~0u, total[k], distance);
    if (thread % kWarp == 0) {
      A* grads = grad_shift + (box * d.classes + klass) * 2 * d.parts() + part;
      grads[0] = total[1];  // x before y
      grads[d.parts()] = total[0];
    }
  }
}

inline int64_t deform_roi_threads(const DeformRoiParams& d) { return d.roi.boxes * d.chunks() * d.roi.bins(); }
inline int64_t shift_positions(const DeformRoiParams& d) { return d.roi.boxes * d.classes * d.parts(); }

}  // namespace dcnseg_ops
