// Random values for the generated cases of the programs in this folder, and the comparison of results.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

static std::mt19937 generator(0);
static inline int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
static inline double normal() { return std::normal_distribution<double>()(generator); }

// Mostly normally distributed; one in `rarity` is very large, not finite, or an integer.
static inline double normal_or_odd(int rarity) {
  const double odd[] = {NAN, INFINITY, -INFINITY, 1e30, -1e30, 2147483647.0, -2147483649.0, -1.0, 0.0, 1.0};
  return pick(1, rarity) == 1 ? odd[pick(0, 9)] : 2 * normal();
}

// Normally distributed; in every second case some or half of them are not finite.
static inline std::vector<double> values_with_odd_ones(int64_t count) {
  const double odd[] = {NAN, INFINITY, -INFINITY, -INFINITY};
  const int kind = pick(0, 3), most = kind == 0 ? 1 : 19;
  std::vector<double> values(static_cast<size_t>(count));
  for (double& v : values) v = kind < 2 && pick(0, most) == 0 ? odd[pick(0, 3)] : normal();
  return values;
}

// `number` converts an actual value to double. Whether a sum is infinite or NaN depends on its order and is ignored,
// except for exact comparisons (tolerance 0).
template <typename T, typename F>
static bool compare(const char* what, const std::vector<T>& ours, const std::vector<double>& expected, double tolerance,
                    F number) {
  for (size_t i = 0; i < ours.size(); ++i) {
    const double value = number(ours[i]);
    if (value == expected[i] || (std::isnan(value) && std::isnan(expected[i]))) continue;
    if (tolerance > 0 && !std::isfinite(value) && !std::isfinite(expected[i])) continue;
    if (std::fabs(value - expected[i]) <= tolerance * (1 + std::fabs(expected[i]))) continue;
    std::printf("%s[%zu] is %g, expected %g\n", what, i, value, expected[i]);
    return false;
  }
  return ours.size() == expected.size();
}
