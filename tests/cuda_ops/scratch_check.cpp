// Checks which blocks the pool of scratch memory reuses: every newly allocated block is counted.
#include <cstdio>
#include <cstdlib>

static int fresh_blocks = 0;
static int counted_memalign(void** data, size_t alignment, size_t bytes) {
  ++fresh_blocks;
  return posix_memalign(data, alignment, bytes);
}
#define posix_memalign counted_memalign
#include "cpu/scratch.h"

using namespace dcnseg_ops;

constexpr size_t kMegabyte = 1 << 20;

// The blocks of one call, taken together and returned; returns the number of newly allocated ones.
static int call(ScratchPool& pool, size_t bytes, int count) {
  const int before = fresh_blocks;
  std::vector<ScratchPool::Block> blocks;
  for (int i = 0; i < count; ++i) blocks.push_back(pool.take(bytes));
  for (const ScratchPool::Block& block : blocks) pool.give(block);
  return fresh_blocks - before;
}

static bool is(const char* what, int fresh, int expected) {
  if (fresh != expected) std::printf("%s: %d fresh blocks, expected %d\n", what, fresh, expected);
  return fresh == expected;
}

int main() {
  ScratchPool pool;
  bool right = is("first call", call(pool, 10 * kMegabyte, 2), 2) && is("again", call(pool, 10 * kMegabyte, 2), 0) &&
               is("another shape", call(pool, 2 * kMegabyte, 3), 3) &&
               is("that shape again", call(pool, 2 * kMegabyte, 3), 0) &&
               is("the first shape, of which the oldest block had to go", call(pool, 10 * kMegabyte, 2), 1) &&
               is("a block that is too large to keep", call(pool, 100 * kMegabyte, 1), 1) &&
               is("it again", call(pool, 100 * kMegabyte, 1), 1) &&
               is("those that were kept meanwhile", call(pool, 10 * kMegabyte, 2), 0);
  call(pool, 64, 1000);  // more than its limit
  return right && is("small blocks", call(pool, 64, 100), 0) ? 0 : 1;
}
