// Compares every microkernel that this CPU supports, for every number of rows, with plain loops: edges of panels, odd
// depths, accumulation. Buffers have exactly their size.
#include "cpu/gemm/microkernel.cpp"
#include "random_case.h"

using namespace dcnseg_ops;

template <typename E>
static std::vector<E> make(int64_t count) {
  std::vector<E> values(static_cast<size_t>(count));
  for (E& v : values) store_one(&v, static_cast<AccOf<E>>(normal()));
  return values;
}

template <typename E>
static double value(const E& v) {
  return static_cast<double>(load_one(&v));
}

template <typename E>
static bool check(const char* name, const Microkernel<E>& kernel) {
  using A = AccOf<E>;
  if (kernel.rows > kMaxTileRows || kernel.rows * kernel.width > kMaxTile) return false;
  for (int rows = 1; rows <= kernel.rows; ++rows)
    for (const bool accumulate : {false, true}) {
      const int64_t depth = pick(0, 3) ? pick(1, 40) : pick(97, 140),
                    padded = kernel.has_pairs ? (depth + 1) / 2 * 2 : depth;
      const int64_t a_stride = padded + pick(0, 3), c_stride = kernel.width + pick(0, 3),
                    step = kernel.has_pairs ? 2 : 1;
      const auto a = make<E>((rows - 1) * a_stride + padded);
      auto b = make<E>(padded * kernel.width);
      if (padded > depth)
        for (int j = 0; j < kernel.width; ++j) b[((depth / 2) * kernel.width + j) * 2 + 1] = E{};
      auto c = make<A>((rows - 1) * c_stride + kernel.width);
      const auto before = c;
      std::vector<double> expected(before.begin(), before.end());
      for (int r = 0; r < rows; ++r)
        for (int j = 0; j < kernel.width; ++j) {
          double& sum = expected[r * c_stride + j];
          if (!accumulate) sum = 0;
          for (int64_t k = 0; k < depth; ++k)
            sum += value(a[r * a_stride + k]) * value(b[(k / step * kernel.width + j) * step + k % step]);
        }
      kernel.run[rows](a.data(), a_stride, b.data(), padded, c.data(), c_stride, accumulate, b.data());
      if (!compare(name, c, expected, std::is_same_v<A, double> ? 1e-13 : 1e-5, [](A v) { return double(v); }))
        return false;
    }
  return true;
}

template <typename E>
static bool check_all(const char* name) {
  bool right = check(name, pick_kernel<E>(1));
  for (int level : {3, 4}) right = right && check(name, pick_kernel<E>(level));
  if (const Microkernel<E>* wide = wide_microkernel<E>()) right = right && check(name, *wide);
  return right;
}

int main() {
  bool right = true;
  for (int i = 0; right && i < 20; ++i) {
    right = check_all<float>("float") && check_all<double>("double");
    if (right && has_bf16_products()) right = check("pairs", microkernel<bf16>());
  }
  return right ? 0 : 1;
}
