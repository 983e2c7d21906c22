// Runs the sampling code of the CPU operator on generated convolutions, beside plain loops in
// double, under the sanitizers. Every buffer has exactly its size, so that a read or a write
// outside of it is an error. Prints what differs; returns 1 if anything does.
#include "cpu/sampling.h"
#include "oracle.h"

template <typename T>
static std::vector<T> cast(const std::vector<double>& values) {
  std::vector<T> out(values.size());
  for (size_t i = 0; i < values.size(); ++i) store_one(&out[i], static_cast<AccOf<T>>(values[i]));
  return out;
}

template <typename T>
static bool check(const Convolution& c, double tolerance) {
  using A = AccOf<T>;
  const DeformConvParams& p = c.p;
  const auto input = cast<T>(c.input);
  const auto offset = cast<A>(c.offset), mask = cast<A>(c.mask);
  const auto grad_columns = cast<T>(c.grad_columns);
  const std::vector<T> zeros(static_cast<size_t>(p.channels), T{});
  const int64_t pixels = p.out_pixels(), planes = p.offset_groups * p.taps();
  Sampler<T> s{p,
               input.data(),
               zeros.data(),
               {offset.data(), 2 * planes * pixels, pixels, p.out_width, 1},
               {mask.data(), planes * pixels, pixels, p.out_width, 1},
               {}};
  for (int64_t channel = 0; channel < p.channels; ++channel)  // the finest segments that there can be
    s.segments.push_back({channel, channel + 1, channel / p.group_channels(), channel / p.offset_group_channels()});
  if (p.groups == 1 && p.offset_groups == 1) s.segments = {{0, p.channels, 0, 0}};

  std::vector<T> columns(grad_columns.size());
  std::vector<A> grad_offset(offset.size()), grad_mask(mask.size()), grad_input(input.size()),
      waste(static_cast<size_t>(p.channels));
  const int64_t half = p.positions() / 2;  // as two threads would
  sample_columns(s, 0, p.positions(), 0, half, columns.data());
  sample_columns(s, 0, p.positions(), half, p.positions(), columns.data());
  const PositionGrads<T> grads{grad_offset.data(), grad_mask.data()};
  position_grads(s, 0, p.positions(), 0, half, grad_columns.data(), grads);
  position_grads(s, 0, p.positions(), half, p.positions(), grad_columns.data(), grads);
  scatter_columns(s, 0, p.positions(), 0, p.channels / 2, grad_columns.data(), grad_input.data(), waste.data());
  scatter_columns(s, 0, p.positions(), p.channels / 2, p.channels, grad_columns.data(), grad_input.data(),
                  waste.data());

  const auto number = [](T v) { return static_cast<double>(load_one(&v)); };
  const auto doubles = [&](const std::vector<T>& values) {
    std::vector<double> out;
    for (const T& v : values) out.push_back(number(v));
    return out;
  };
  const Expected e = expect(
      p, doubles(input), offset, mask, doubles(grad_columns),
      [&](int64_t b, int64_t channel, int64_t y, int64_t x) {
        return ((b * p.height + y) * p.width + x) * p.channels + channel;
      },
      [&](int64_t b, int64_t pixel, int64_t channel, int64_t t) {
        const int64_t group = channel / p.group_channels(), position = b * pixels + pixel;
        return ((group * p.positions() + position) * p.taps() + t) * p.group_channels() + channel % p.group_channels();
      });
  const auto same = [](A v) { return static_cast<double>(v); };
  return compare("columns", columns, e.columns, tolerance, number) &&
         compare("grad_offset", grad_offset, e.offset, 10 * tolerance, same) &&
         compare("grad_mask", grad_mask, e.mask, 10 * tolerance, same) &&
         compare("grad_input", grad_input, e.input, 10 * tolerance, same);
}

int main() {
  for (int i = 0; i < 60; ++i) {
    const Convolution c = generate();
    if (!check<double>(c, 1e-12) || !check<float>(c, 2e-4) || !check<bf16>(c, 1e-2)) {
      std::printf("convolution %d\n", i);
      return 1;
    }
  }
  return 0;
}
