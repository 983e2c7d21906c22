// Work that several threads need the result of, and that is done once.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
namespace dcnseg_ops {

// Whoever needs it does pieces of it until none is left, and then waits for those that others have taken. Nothing is
// done before a thread comes to need it, which then has what it did itself in its cache.
class SharedWork {
 public:
  // Returns when all of `pieces`, always as many, are done: f(i) for each of them, on any of the threads. It must not
  // throw, as the others would wait for that piece for ever.
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
