// Work that is done once by the threads that need its result.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
namespace dcnseg_ops {

// A thread that needs the result executes pieces until none is left, then waits for those of other threads. Work
// starts when the first thread needs it, so that the result is in that thread's cache.
class SharedWork {
 public:
  // Returns when all `pieces` pieces are done: f(i) for each of them, on any thread. `pieces` must be the same in
  // every call. f must not throw, because other threads would wait for its piece forever.
  template <typename F>
  void need(int64_t pieces, const F& f) {
    static_assert(noexcept(f(pieces)));
    if (is_done(pieces)) return;
    for (int64_t i; (i = taken_.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
      f(i);
      done_.fetch_add(1, std::memory_order_release);
    }
    while (!is_done(pieces)) std::this_thread::yield();
  }

 private:
  bool is_done(int64_t pieces) const { return done_.load(std::memory_order_acquire) == pieces; }

  std::atomic<int64_t> taken_{0}, done_{0};
};

}  // namespace dcnseg_ops
