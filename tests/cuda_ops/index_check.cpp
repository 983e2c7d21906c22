// Runs the last threads of the CUDA kernels on the host on tensors of more than 2^31 elements, whose memory is
// reserved and allocated on first use. An index computed in 32 bits accesses another address or is a signed overflow,
// which the sanitizer reports. Returns 1 if an element is wrong, and 77 if this machine does not reserve so much
// memory.
#define DCN_EMULATE
#include <sys/mman.h>
#include <sys/resource.h>
#include <cstdio>
#include <cstdlib>
#include "cuda/conv/column_grads.cuh"
#include "cuda/roi/deform_roi_pool.cuh"
#include "cuda/roi/roi_pool.cuh"
#include "cuda/transposes.cuh"
using namespace dcnseg_ops;

template <typename T>
class Reserved {  // `count` zeros
 public:
  explicit Reserved(long long count) : count_(count), data_(nullptr) {
    void* data = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) std::exit(77);
    data_ = static_cast<T*>(data);
  }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  ~Reserved() { munmap(data_, bytes()); }
  T* data() const { return data_; }
  T& from_end(long long i) const { return data_[count_ - i]; }  // 1: the last element
  bool is_huge() const { return count_ > (1LL << 31); }

 private:
  size_t bytes() const { return static_cast<size_t>(count_) * sizeof(T); }
  long long count_;
  T* data_;
};

// Runs those of n threads that are in the block of the last one, one after another.
template <typename F>
static void run_last_threads(long long n, const F& kernel) {
  blockDim = dim3(32);
  gridDim = dim3(1u << 30);  // so that no thread iterates
  blockIdx = dim3(static_cast<unsigned>((n - 1) / 32));
  for (unsigned t = 0; t < 32; ++t) {
    threadIdx = dim3(t);
    kernel();
  }
}

// Runs one block of a kernel whose threads exchange values.
template <typename F>
static void run_block(dim3 index, dim3 threads, const F& kernel) {
  emu::launch(dim3(1), threads, 0, [&] {
    blockIdx = index;
    kernel();
  });
}

static bool ok = true;
static void expect(const char* what, double value, double expected) {
  if (value == expected) return;
  std::printf("%s is %g, expected %g\n", what, value, expected);
  ok = false;
}

// The last pixel of the last image is 3; the gradient of its last column is 5.
static void check_convolution() {
  DeformConvParams p{};
  p.batch = 2, p.channels = p.out_channels = 65536, p.groups = p.offset_groups = 16384;
  p.height = p.width = p.out_height = p.out_width = 200;
  p.kernel_h = 2, p.kernel_w = 1, p.stride_h = p.stride_w = p.dilation_w = 1, p.dilation_h = 2, p.pad_h = 1;
  const long long inputs = 2 * 65536LL * 40000, places = 2 * 16384LL * 2 * 40000;
  const Reserved<float> input(inputs), columns(2 * inputs), offset(2 * places), mask(places), grad_columns(2 * inputs),
      grad_offset(2 * places), grad_mask(places), grad_input(inputs);
  for (const auto* tensor : {&input, &columns, &offset, &mask}) expect("huge", tensor->is_huge(), 1);
  input.from_end(1) = 3;
  grad_columns.from_end(1) = 5;
  mask.from_end(1) = 1;
  offset.from_end(40000 + 1) = -1;  // the last tap is one row below the map and is moved back to it
  const Positions<float> positions{offset.data(), mask.data()};
  const Range all{0, p.positions()};
  const dim3 last(blocks_of_spots(p, all).x - 1);
  run_block(last, dim3(kThreads),
            [&] { sample_columns<float, float, 4>(p, input.data(), positions, all, columns.data()); });
  const ColumnGrads<float> grads{grad_offset.data(), grad_mask.data(), grad_input.data()};
  run_block(last, dim3(kThreads), [&] {
    column_grads<float, float, 4>(p, input.data(), positions, all, 8, true, grad_columns.data(), grads);
  });
  expect("column", columns.from_end(1), 3);
  expect("column in its gradient's place", grad_columns.from_end(1), 3);
  expect("grad_input", grad_input.from_end(1), 5);
  expect("grad_offset y", grad_offset.from_end(40000 + 1), -15);
  expect("grad_offset x", grad_offset.from_end(1), -15);
  expect("grad_mask", grad_mask.from_end(1), 15);
}

// The last element of rows is also the last one of planes.
static void check_transposes() {
  const long long channels = 65536, pixels = 40000, count = 2 * channels * pixels;
  const Range all{0, 2 * pixels};
  dim3 last = tiles_of(all.count, channels);
  last = dim3(last.x - 1, last.y - 1);
  const Reserved<float> planes(count), rows(count);
  expect("huge", planes.is_huge(), 1);
  planes.from_end(1) = 3;
  run_block(last, tile_threads(), [&] { planes_to_rows<float>(planes.data(), channels, pixels, all, rows.data()); });
  expect("rows", rows.from_end(1), 3);
  rows.from_end(1) = 5;
  run_block(last, tile_threads(),
            [&] { rows_to_planes<float, float>(rows.data(), channels, pixels, all, planes.data()); });
  expect("planes", planes.from_end(1), 5);
}

// 50000 boxes of 7 x 7 bins over 1000 channels: the last bin of the last box is the last pixel.
constexpr long long kBoxes = 50000, kChannelsOut = 1000, kBins = 49, kPixels = 40000;

static RoiParams roi_params(long long batch, long long groups, bool channels_last) {
  RoiParams p{};
  p.batch = batch, p.height = p.width = 200, p.boxes = kBoxes, p.out_channels = kChannelsOut;
  p.kernel_h = p.kernel_w = 7, p.group_h = p.group_w = groups;
  p.input = dense_layout(kChannelsOut * groups * groups, kPixels, channels_last);
  p.output = dense_layout(kChannelsOut, kBins, channels_last);
  p.channels_last = channels_last;
  return p;
}

static void check_windows(long long batch, long long groups, bool channels_last) {
  const RoiParams p = roi_params(batch, groups, channels_last);
  const long long inputs = batch * kChannelsOut * groups * groups * kPixels, outputs = kBoxes * kChannelsOut * kBins;
  const Reserved<float> input(inputs), output(outputs), grad(outputs), grad_input(inputs);
  const Reserved<int32_t> argmax(outputs), bins(kBoxes * 29);
  for (const auto* tensor : {&input, &output}) expect("huge", tensor->is_huge(), 1);
  bins.from_end(29) = static_cast<int32_t>(batch - 1);
  bins.from_end(7 + 1) = bins.from_end(14 + 7 + 1) = 199;  // begins of the last row and column
  bins.from_end(1) = bins.from_end(14 + 1) = 200;          // ends
  input.from_end(1) = 3;
  grad.from_end(1) = 5;
  run_last_threads(outputs, [&] {
    if (groups > 1) {
      roi_mean_forward<float, float>(p, input.data(), bins.data(), output.data());
      roi_mean_backward<float, float>(p, grad.data(), bins.data(), grad_input.data());
    } else {
      roi_max_forward<float, float>(p, input.data(), bins.data(), output.data(), argmax.data());
      roi_max_backward<float, float>(p, grad.data(), bins.data(), argmax.data(), grad_input.data());
    }
  });
  expect("output", output.from_end(1), 3);
  expect("argmax", argmax.from_end(1), groups > 1 ? 0 : kPixels - 1);
  expect("grad_input", grad_input.from_end(1), 5);
}

static void check_deformed(bool channels_last) {
  const DeformRoiParams d{roi_params(2, 7, channels_last), kChannelsOut, 7, 7, Border::zero};
  const long long inputs = 2 * kChannelsOut * 49 * kPixels, outputs = kBoxes * kChannelsOut * kBins;
  const Reserved<float> input(inputs), output(outputs), grad(outputs), grad_input(inputs), shift(2 * outputs),
      grad_shift(2 * outputs), samples(kBoxes * 43);
  samples.from_end(43) = 1;
  samples.from_end(1) = samples.from_end(21 + 1) = 1;                   // counts of the last row and column
  samples.from_end(14 + 1) = 199, samples.from_end(21 + 14 + 1) = 200;  // firsts: a row below the map
  shift.from_end(1) = -1;                                               // y, moved back to the map
  input.from_end(1) = 3;
  grad.from_end(1) = 5;
  const RoiPositions<float> positions{samples.data(), shift.data()};
  const auto n = deform_roi_threads(d), shifts = shift_positions(d);
  run_last_threads(n, [&] {
    deform_roi_forward<float, float>(d, input.data(), positions, n, output.data());
    deform_roi_input_grads<float, float>(d, grad.data(), positions, n, grad_input.data());
  });
  run_block(dim3(static_cast<unsigned>(shifts - 1)), dim3(32), [&] {
    deform_roi_shift_grads<float, float>(d, grad.data(), input.data(), positions, shifts, grad_shift.data());
  });
  expect("output", output.from_end(1), 3);
  expect("grad_input", grad_input.from_end(1), 5);
  expect("grad_shift y", grad_shift.from_end(1), -15);
  expect("grad_shift x", grad_shift.from_end(kBins + 1), -15);
}

int main() {
  const rlimit seconds{10, 10};  // a wrong index may cause an endless loop
  setrlimit(RLIMIT_CPU, &seconds);
  check_convolution();
  check_transposes();
  for (const bool channels_last : {false, true}) {
    check_windows(60, 1, channels_last);
    check_windows(2, 7, channels_last);
    check_deformed(channels_last);
  }
  return ok ? 0 : 1;
}
