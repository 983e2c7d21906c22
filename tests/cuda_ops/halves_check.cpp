// Checks the conversions of 16-bit floats: every float16 is read correctly, and values of all magnitudes are rounded
// to nearest even, as scalars and in vectors.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include "cpu/simd.h"
using namespace dcnseg_ops;

// Format with `kBits` of fraction and exponents from kMin to kMax.
template <int kBits, int kMin, int kMax>
static double rounded(float v) {
  if (v != v || v == 0 || std::isinf(v)) return v;
  const double size = std::fabs(double(v)), step = std::ldexp(1, std::max(std::ilogb(size), kMin) - kBits);
  const double result = std::nearbyint(size / step) * step;
  const double most = std::ldexp(2 - std::ldexp(1, -kBits), kMax);
  return std::copysign(result > most ? std::numeric_limits<double>::infinity() : result, v);
}

static bool is_same(double a, double b) { return a != a ? b != b : a == b && std::signbit(a) == std::signbit(b); }

static double value_of(int bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double v = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  if (exponent == 31) v = fraction ? std::nan("") : std::numeric_limits<double>::infinity();
  return bits & 0x8000 ? -v : v;
}

static bool check_reading() {
  for (int first = 0; first < 65536; first += 16) {
    f16 halves[16];
    for (int i = 0; i < 16; ++i) halves[i].bits = static_cast<uint16_t>(first + i);
    const f32x16 all = load(halves);
    for (int i = 0; i < 16; ++i)
      if (!is_same(value_of(first + i), load_one(halves + i)) || !is_same(value_of(first + i), all[i])) {
        std::printf("float16 %04x is read as %g and %g\n", first + i, double(load_one(halves + i)), double(all[i]));
        return false;
      }
  }
  return true;
}

template <typename T, typename Oracle>
static bool check_rounding(const char* name, const Oracle& oracle) {
  constexpr uint64_t kStep = 4099;  // a prime: all exponents with many fractions, including ties
  for (uint64_t first = 0; first < uint64_t(1) << 32; first += 16 * kStep) {
    float from[16];
    for (uint64_t i = 0; i < 16; ++i) {
      uint32_t bits = static_cast<uint32_t>(first + i * kStep);
      if (i % 4 == 3) bits &= 0xfffff000;                   // a tie of float16, or next to one
      if (i % 4 == 2) bits = (bits & 0xffff0000) | 0x8000;  // of bfloat16
      std::memcpy(from + i, &bits, 4);
    }
    T alone[16], together[16];
    for (int i = 0; i < 16; ++i) store_one(alone + i, from[i]);
    store(together, load(from));
    for (int i = 0; i < 16; ++i)
      if (!is_same(oracle(from[i]), load_one(alone + i)) || !is_same(oracle(from[i]), load_one(together + i))) {
        std::printf("%g as %s is %g and %g\n", double(from[i]), name, double(load_one(alone + i)),
                    double(load_one(together + i)));
        return false;
      }
  }
  return true;
}

int main() {
  return check_reading() && check_rounding<f16>("float16", rounded<10, -14, 15>) &&
                 check_rounding<bf16>("bfloat16", rounded<7, -126, 127>)
             ? 0
             : 1;
}
