// Scratch memory that is reused between calls.
//
// The kernel clears new memory page by page on first use: for the 9 MB of a packed weight of 512 channels that took as
// long as sampling all columns.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>
namespace dcnseg_ops {

class ScratchPool {
 public:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };

  Block take(size_t bytes) {
    if (kIsExact) return fresh(bytes);
    bytes = (bytes / 64 + 1) * 64;
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock) {
      size_t best = idle_.size();
      for (size_t i = 0; i < idle_.size(); ++i)
        if (idle_[i].bytes >= bytes && idle_[i].bytes <= 2 * bytes &&
            (best == idle_.size() || idle_[i].bytes < idle_[best].bytes))
          best = i;
      if (best < idle_.size()) {
        const Block block = idle_[best];
        idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(best));
        idle_bytes_ -= block.bytes;
        return block;
      }
    }
    return fresh(bytes);
  }

  void give(Block block) noexcept {
    if (!block.data) return;
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (lock && !kIsExact && block.bytes <= kMaxIdle) {
        while (idle_bytes_ + block.bytes > kMaxIdle || idle_.size() == idle_.capacity()) free_oldest();
        idle_.push_back(block);
        idle_bytes_ += block.bytes;
        return;
      }
    }
    std::free(block.data);
  }

  ScratchPool() { idle_.reserve(256); }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool kIsExact = true;  // so that it detects out-of-bounds accesses
#else
  static constexpr bool kIsExact = false;
#endif
  static Block fresh(size_t bytes) {
    void* data = nullptr;
    if (posix_memalign(&data, 64, bytes) != 0) throw std::bad_alloc();
    return {data, bytes};
  }

  // Frees blocks of other sizes to make room for the returned one.
  void free_oldest() noexcept {
    std::free(idle_.front().data);
    idle_bytes_ -= idle_.front().bytes;
    idle_.erase(idle_.begin());
  }

  static constexpr size_t kMaxIdle = 24 << 20;
  std::mutex mutex_;         // only try_lock: a process forked while it is locked would wait forever
  std::vector<Block> idle_;  // oldest first
  size_t idle_bytes_ = 0;
};

// One per process, never destroyed, because threads may still use it at exit.
inline ScratchPool& scratch_pool() {
  static ScratchPool* pool = new ScratchPool;
  return *pool;
}

template <typename T>
class Buffer {  // uninitialized memory for one call, aligned to cache lines
 public:
  Buffer() = default;
  Buffer(Buffer&& o) noexcept : block_(o.block_) { o.block_ = {}; }
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() { scratch_pool().give(block_); }
  // The same memory with its contents, until more is requested than ever before.
  T* get(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    if (!block_.data || bytes > block_.bytes) {
      scratch_pool().give(std::exchange(block_, {}));
      block_ = scratch_pool().take(bytes);
    }
    return static_cast<T*>(block_.data);
  }

 private:
  ScratchPool::Block block_;
};

}  // namespace dcnseg_ops
