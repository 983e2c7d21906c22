// The kernels of RoI pooling over whole pixels: maximum and mean. Independent of torch (see kernel_common.cuh).
//
// Forward: a thread has one element of the output and iterates over the pixels of its bin. Backward: a thread has one
// element of the gradient and adds it to the pixels it was computed from, with atomics.
//
// Pitfall: bins overlap, so that the last bits of sums of gradients may differ between runs. dcnseg uses the PyTorch
// implementation if deterministic algorithms are enabled.
#pragma once
#include <math.h>
#include "cuda/roi/roi_common.cuh"
namespace dcnseg_ops {

// The first maximum in row-major order and its pixel. NaN is the maximum. An empty bin gives 0, an invalid box NaN;
// both have the pixel -1.
template <typename T, typename A>
__global__ void roi_max_forward(RoiParams p, const T* input, const int32_t* bins, T* output, int32_t* argmax) {
  DCN_FOR_EACH(i, p.outputs()) {
    const Place place = place_of(p, p.out_channels, i);
    const Window w = window_of(p, bins, place.box, place.bin);
    A best = w.image < 0 ? A(NAN) : A(0);
    int32_t index = -1;
    if (w.image >= 0 && w.pixels() > 0) {
      best = A(-INFINITY);
      index = w.top * p.width + w.left;
      const T* map = input + p.input.at(w.image, place.channel, 0);
      for (int32_t y = w.top; y < w.bottom; ++y)
        for (int32_t x = w.left; x < w.right; ++x) {
          const int32_t pixel = y * p.width + x;
          const A v = to_sum(map[pixel * p.input.pixel]);
          if (best == best && !(v <= best)) {  // greater, or the first NaN
            best = v;
            index = pixel;
          }
        }
    }
    output[i] = Value<T>::from(best);
    argmax[i] = index;
  }
}

// grad and argmax have the layout of the output.
template <typename T, typename A>
__global__ void roi_max_backward(RoiParams p, const T* grad, const int32_t* bins, const int32_t* argmax,
                                 A* grad_input) {
  DCN_FOR_EACH(i, p.outputs()) {
    const Place place = place_of(p, p.out_channels, i);
    const int64_t image = window_of(p, bins, place.box, place.bin).image;
    const int32_t pixel = argmax[i];
    if (image < 0 || pixel < 0 || pixel >= p.height * p.width) continue;
    atomicAdd(grad_input + p.input.at(image, place.channel, pixel), static_cast<A>(to_sum(grad[i])));
  }
}

template <typename T, typename A>
__global__ void roi_mean_forward(RoiParams p, const T* input, const int32_t* bins, T* output) {
  DCN_FOR_EACH(i, p.outputs()) {
    const Place place = place_of(p, p.out_channels, i);
    const Window w = window_of(p, bins, place.box, place.bin);
    A mean = w.image < 0 ? A(NAN) : A(0);
    if (w.image >= 0 && w.pixels() > 0) {
      const T* map = input + p.input.at(w.image, p.input_channel(place.channel, place.bin), 0);
      for (int32_t y = w.top; y < w.bottom; ++y)
        for (int32_t x = w.left; x < w.right; ++x) mean += to_sum(map[(y * p.width + x) * p.input.pixel]);
      mean /= static_cast<A>(w.pixels());
    }
    output[i] = Value<T>::from(mean);
  }
}

template <typename T, typename A>
__global__ void roi_mean_backward(RoiParams p, const T* grad, const int32_t* bins, A* grad_input) {
  DCN_FOR_EACH(i, p.outputs()) {
    const Place place = place_of(p, p.out_channels, i);
    const Window w = window_of(p, bins, place.box, place.bin);
    if (w.image < 0 || w.pixels() == 0) continue;
    const A share = to_sum(grad[i]) / static_cast<A>(w.pixels());
    A* map = grad_input + p.input.at(w.image, p.input_channel(place.channel, place.bin), 0);
    for (int32_t y = w.top; y < w.bottom; ++y)
      for (int32_t x = w.left; x < w.right; ++x) atomicAdd(map + (y * p.width + x) * p.input.pixel, share);
  }
}

}  // namespace dcnseg_ops
