// The functions of cuda/conv/tensor_core.cuh on host threads, written from the documentation of the instructions,
// independently of their use: fragments and descriptors are decoded again, and a copy or GEMM that is not waited for
// has not happened.
#pragma once
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>
#include "emulator/cuda_emu.h"  // after kernel_common.cuh, which defines the element types

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }

namespace emu {

// Sleeps while *word has this value; the thread that changes it calls wake. Memory is ordered by the atomics alone, so
// that ThreadSanitizer sees exactly the order that the barriers of the GPU guarantee.
inline void sleep_while(const uint32_t* word, uint32_t value) {
  while (__atomic_load_n(word, __ATOMIC_ACQUIRE) == value)
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
inline void wake(const uint32_t* word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

struct MemoryBarrier {      // in 8 bytes of shared memory
  uint32_t phase;           // number of complete phases
  uint16_t pending, count;  // arrivals of this phase
};
static_assert(sizeof(MemoryBarrier) == 8);

struct NamedBarrier {
  uint32_t arrived = 0, generation = 0;
};
inline NamedBarrier named_barriers[16];

// Exchange between the lanes of a warp. Two alternating buffers: no lane writes to one before all have read it.
struct Exchange {
  uint32_t words[2][32][8];
};
inline Exchange exchanges[32];
inline thread_local unsigned exchange_turn = 0;

using Lanes = uint32_t (*)[8];
inline Lanes exchange(const uint32_t* words, size_t count) {
  const unsigned warp = linear() / 32, lane = linear() % 32;
  Lanes all = exchanges[warp].words[exchange_turn++ % 2];
  std::memcpy(all[lane], words, count * sizeof *words);
  __syncwarp();
  return all;
}

// Operations that are issued, committed in groups, and complete when they are waited for; the emulation runs them
// then.
class AsyncGroups {
 public:
  void issue(std::function<void()> operation) { open_.push_back(std::move(operation)); }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  void wait(size_t may_run) {
    for (; groups_.size() > may_run; groups_.pop_front())
      for (const auto& operation : groups_.front()) operation();
  }

 private:
  std::vector<std::function<void()>> open_;
  std::deque<std::vector<std::function<void()>>> groups_;
};
inline thread_local AsyncGroups copies, products;

// Dynamic shared memory is aligned to 16 bytes, and here to no larger power of two.
constexpr uint32_t kFirstAddress = 16;
inline unsigned char* shared(uint32_t address) { return dyn.data() + (address - kFirstAddress); }

// Shared memory as seen by wgmma: the writes of a thread become visible with its fence.
inline unsigned char async_view[256 << 10];
inline thread_local std::vector<uint32_t> unfenced;  // addresses of 16 bytes
inline void write_shared(uint32_t address, const void* from) {
  if (from)
    std::memcpy(shared(address), from, 16);
  else
    std::memset(shared(address), 0, 16);
  unfenced.push_back(address);
}

// Rounds as cvt.rna.tf32.f32: to nearest, ties away from zero.
inline uint32_t tf32_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return std::isfinite(v) ? (bits + 0x1000) & ~0x1fffu : bits;
}

// The elements in the 4 bytes of a register, as read by a tensor core.
template <typename T>
constexpr int kPerRegister = 4 / sizeof(T);
template <typename T>
float number(uint32_t bits, int i) {
  if constexpr (sizeof(T) == 2) {
    return dcnseg_ops::to_sum(T{static_cast<uint16_t>(bits >> (16 * i))});
  } else {
    bits &= ~0x1fffu;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
}

}  // namespace emu

namespace dcnseg_ops {

using Bfloat16 = __nv_bfloat16;
using Float16 = __half;

template <typename T>
float2 unpack(uint32_t word, const T*) {
  return {emu::number<T>(word, 0), emu::number<T>(word, 1)};
}
template <typename T>
uint32_t pack(float low, float high, const T*) {
  return Value<T>::from(low).bits | uint32_t(Value<T>::from(high).bits) << 16;
}
inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t to_tf32(float v) { return emu::tf32_of(v); }
inline uint4 load_or_zeros(const char* base, int32_t index, uint32_t pitch, bool wanted) {
  uint4 v{0, 0, 0, 0};
  if (wanted && index >= 0) std::memcpy(&v, base + uint64_t{static_cast<uint32_t>(index)} * pitch, sizeof v);
  return v;
}

inline uint32_t shared_address(const void* p) {
  return emu::kFirstAddress + static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emu::dyn.data());
}
inline void store_shared(uint32_t address, uint4 v) { emu::write_shared(address, &v); }
inline uint4 load_shared(uint32_t address) {
  uint4 v;
  std::memcpy(&v, emu::shared(address), sizeof v);
  return v;
}

inline void copy_async(uint32_t to, const void* from, bool wanted) {
  emu::copies.issue([=] { emu::write_shared(to, wanted ? from : nullptr); });
}
inline void commit_copies() { emu::copies.commit(); }
template <int kMayRun>
void wait_for_copies() {
  emu::copies.wait(kMayRun);
}

// ldmatrix.x4: lane l names row l % 8 of matrix l / 8; of each matrix a lane gets bytes 4 * (l % 4) of row l / 4.
inline void load_matrices(uint32_t (&matrix)[4], uint32_t address) {
  const emu::Lanes all = emu::exchange(&address, 1);
  const unsigned lane = emu::linear() % 32;
  for (unsigned i = 0; i < 4; ++i) std::memcpy(&matrix[i], emu::shared(all[8 * i + lane / 4][0]) + 4 * (lane % 4), 4);
}

// mma.m16n8k16 and, of tf32, m16n8k8: a row of A, or a column of B, has 32 bytes. Register r of A holds bytes
// 16 * (r / 2) + 4 * (lane % 4) of row lane / 4 + 8 * (r % 2); register r of B the same bytes of 16 * r of column lane
// / 4; number i of D row lane / 4 + 8 * (i / 2), column 2 * (lane % 4) + i % 2.
template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const T*) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const emu::Lanes all = emu::exchange(mine, 6);
  const unsigned lane = emu::linear() % 32;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (unsigned word = 0; word < 8; ++word) {
      const uint32_t left = all[row % 8 * 4 + word % 4][word / 4 * 2 + row / 8],
                     right = all[column * 4 + word % 4][4 + word / 4];
      for (int n = 0; n < emu::kPerRegister<T>; ++n) d[i] += emu::number<T>(left, n) * emu::number<T>(right, n);
    }
  }
}

inline void fence_async_proxy() {
  for (const uint32_t address : emu::unfenced) std::memcpy(emu::async_view + address, emu::shared(address), 16);
  emu::unfenced.clear();
}

// The 4 bytes at `byte` of a row of a descriptor: rows of 128 bytes in groups of eight at the given stride, whose
// 16-byte vectors are swizzled by bits of their address.
inline uint32_t described_word(uint64_t descriptor, unsigned row, unsigned byte) {
  const uint64_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) std::abort();  // unsupported swizzle
  uint64_t address = start + row / 8 * stride + row % 8 * 128 + byte;
  address ^= (address >> 7 & 7) << 4;
  uint32_t word;
  std::memcpy(&word, emu::async_view + address, 4);
  return word;
}

// wgmma.m64nNk16 and, of tf32, m64nNk8: warp w of the four has rows 16 w to 16 w + 15 of D, as mma.m16n8's D, for every
// eight columns.
template <int kColumns, typename T>
void issue_product(float (&d)[kColumns / 2], uint64_t a, uint64_t b, const T*) {
  emu::products.issue([&d, a, b] {
    const unsigned thread = emu::linear() % 128, lane = thread % 32;
    for (unsigned i = 0; i < kColumns / 2; ++i) {
      const unsigned row = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      for (unsigned byte = 0; byte < 32; byte += 4) {
        const uint32_t left = described_word(a, row, byte), right = described_word(b, column, byte);
        for (int n = 0; n < emu::kPerRegister<T>; ++n) d[i] += emu::number<T>(left, n) * emu::number<T>(right, n);
      }
    }
  });
}
inline void fence_products() {}  // orders registers; a no-op here
inline void commit_products() { emu::products.commit(); }
template <int kMayRun>
void wait_for_products() {
  emu::products.wait(kMayRun);
}
template <int kRegisters>
void raise_registers() {}
template <int kRegisters>
void lower_registers() {}

inline void init_barrier(uint64_t* barrier, uint32_t arrivals) {
  const emu::MemoryBarrier fresh{0, static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals)};
  std::memcpy(barrier, &fresh, sizeof fresh);
}
inline void arrive(uint64_t* barrier) {
  uint64_t old = __atomic_load_n(barrier, __ATOMIC_RELAXED), fresh;
  emu::MemoryBarrier state;
  do {
    std::memcpy(&state, &old, sizeof state);
    if (--state.pending == 0) state.pending = state.count, ++state.phase;
    std::memcpy(&fresh, &state, sizeof state);
  } while (!__atomic_compare_exchange_n(barrier, &old, fresh, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  if (state.pending == state.count) emu::wake(reinterpret_cast<uint32_t*>(barrier));
}
// Returns once the phase of this parity is complete.
inline void wait_for(uint64_t* barrier, uint32_t parity) {
  const uint32_t* phase = reinterpret_cast<uint32_t*>(barrier);
  for (;;) {
    const uint32_t seen = __atomic_load_n(phase, __ATOMIC_ACQUIRE);
    if ((seen & 1) != parity) return;
    emu::sleep_while(phase, seen);
  }
}
template <int kCount>
void sync_named(int id) {
  emu::NamedBarrier& barrier = emu::named_barriers[id];
  const uint32_t generation = __atomic_load_n(&barrier.generation, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL) == kCount) {
    __atomic_store_n(&barrier.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&barrier.generation, generation + 1, __ATOMIC_RELEASE);
    emu::wake(&barrier.generation);
  } else {
    emu::sleep_while(&barrier.generation, generation);
  }
}

}  // namespace dcnseg_ops
