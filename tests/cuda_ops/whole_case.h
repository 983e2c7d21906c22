// A complete convolution with its expected results.
#pragma once
#include "fake_torch.h"
#include "oracle.h"

template <typename F>
static void for_each(const Tensor& t, const F& f) {  // f(place in order, place in memory)
  const int64_t *n = t.sizes(), *s = t.strides();
  int64_t i = 0;
  for (int64_t a = 0; a < n[0]; ++a)
    for (int64_t b = 0; b < n[1]; ++b)
      for (int64_t c = 0; c < n[2]; ++c)
        for (int64_t d = 0; d < n[3]; ++d) f(i++, a * s[0] + b * s[1] + c * s[2] + d * s[3]);
}

// `round` rounds values to the type of the operator; positions are computed in A.
template <typename A>
struct Whole {
  using Values = std::vector<double>;
  const Convolution& c;
  const DeformConvParams& p;
  bool has_mask, has_bias;
  Values input, mask, weight, bias, grad, output, grad_weight;
  Expected e;

  Whole(const Convolution& convolution, Values (*round)(const Values&))
      : c(convolution), p(c.p), has_mask(pick(0, 1)), has_bias(pick(0, 1)), input(round(c.input)) {
    const auto normals = [&](int64_t count) {
      Values values(static_cast<size_t>(count));
      for (double& v : values) v = normal();
      return round(values);
    };
    mask = has_mask ? c.mask : Values(c.mask.size(), 1.0);
    weight = normals(p.out_channels * p.depth());
    bias = normals(p.out_channels);
    grad = normals(p.out_channels * p.positions());
    Values grad_columns(static_cast<size_t>(p.positions() * p.channels * p.taps()));
    for_products([&](int64_t out, int64_t w, int64_t column) { grad_columns[column] += weight[w] * grad[out]; });
    e = expect(
        p, input, std::vector<A>(c.offset.begin(), c.offset.end()), std::vector<A>(mask.begin(), mask.end()),
        grad_columns,
        [&](int64_t b, int64_t channel, int64_t y, int64_t x) {
          return ((b * p.channels + channel) * p.height + y) * p.width + x;
        },
        [&](int64_t b, int64_t pixel, int64_t channel, int64_t t) { return column_at(b, pixel, channel, t); });
    output.resize(grad.size()), grad_weight.resize(weight.size());
    for (size_t i = 0; has_bias && i < output.size(); ++i)
      output[i] = bias[i / static_cast<size_t>(p.out_pixels()) % static_cast<size_t>(p.out_channels)];
    for_products([&](int64_t out, int64_t w, int64_t column) {
      output[out] += weight[w] * e.columns[column];
      grad_weight[w] += grad[out] * e.columns[column];
    });
  }
  int64_t column_at(int64_t b, int64_t pixel, int64_t channel, int64_t t) const {
    return ((b * p.out_pixels() + pixel) * p.channels + channel) * p.taps() + t;
  }
  template <typename F>
  void for_products(const F& f) const {  // f(output, weight, column)
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t o = 0; o < p.out_channels; ++o)
        for (int64_t pixel = 0; pixel < p.out_pixels(); ++pixel)
          for (int64_t i = 0; i < p.group_channels(); ++i)
            for (int64_t t = 0; t < p.taps(); ++t)
              f((b * p.out_channels + o) * p.out_pixels() + pixel, (o * p.group_channels() + i) * p.taps() + t,
                column_at(b, pixel, o / p.group_outputs() * p.group_channels() + i, t));
  }
};
