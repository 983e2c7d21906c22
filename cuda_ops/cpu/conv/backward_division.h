// Division of the backward of a deformable convolution into chunks of channels, parts, and blocks of positions.
#pragma once
#include "cpu/layout.h"
#include "cpu/parts.h"
namespace dcnseg_ops {

constexpr int64_t kMaxDepth = 320;          // per step
constexpr int64_t kCacheBytes = 640 << 10;  // gradient rows, columns and column gradients of a block
constexpr int64_t kLine = 16;               // channels: a cache line of float

// Channels [begin, end) of one convolution group, processed by one thread at a time.
struct Chunk {
  int64_t begin, end, group;
  size_t first_step, last_step;
  int64_t first_plane, last_plane;  // pairs of offset group and tap that use these channels

  int64_t channels() const { return end - begin; }
  int64_t planes() const { return last_plane - first_plane; }
};

// How the work is cut: into chunks of channels, parts and blocks of positions.
struct Division {
  std::vector<Chunk> chunks;
  std::vector<DepthStep> steps;  // of all chunks
  Parts parts;
  int64_t workers, block, stretch;                          // stretch: number of positions whose sums a worker keeps
  int64_t max_channels = 0, max_depth = 0, max_planes = 0;  // of a chunk or step

  int64_t rounds() const { return (static_cast<int64_t>(chunks.size()) + workers - 1) / workers; }
};

// Number of threads, channels per chunk, and parts, such that the copies fit in kMaxCopies, or one megabyte per
// thread. `copied_bytes`: bytes copied or summed in a buffer, per pixel and channel.
template <typename A>
int64_t divide_channels(const DeformConvParams& p, const Planes<A>& offset, int64_t copied_bytes, Division& d) {
  const int64_t threads = thread_count(), all_pixels = p.batch * p.height * p.width;
  const int64_t most = std::min(p.group_channels(), round_up((p.channels + threads - 1) / threads, kLine));
  d.parts.parts = {{0, p.positions(), 0, all_pixels}};
  d.workers = threads;
  if (copied_bytes == 0) return most;
  const int64_t fit = std::max(kMaxCopies / threads, kMinCopies) / copied_bytes;  // pixels times channels
  if (all_pixels * most <= fit) return most;
  for (int64_t channels = std::min(most, 4 * kLine); channels >= std::min(most, kLine); channels /= 2) {
    d.parts = parts_of(p, offset, fit / channels);
    if (!d.parts.parts.empty()) return channels;
  }
  // Large offsets: process whole images with few channels and few threads.
  const int64_t pixels = p.height * p.width;
  d.parts = parts_of(p, offset, pixels);
  const int64_t channels = std::max<int64_t>(1, std::min(most, kMaxCopies / (pixels * copied_bytes * threads)));
  d.workers = std::max<int64_t>(1, std::min(threads, kMaxCopies / (pixels * copied_bytes * channels)));
  return channels;
}

// `sum_planes`: number of position sums per plane, 2 for the offset and 1 for the mask.
template <typename A>
Division divide(const DeformConvParams& p, const Planes<A>& offset, int64_t copied_bytes, int64_t sum_planes) {
  Division d;
  const int64_t channels = divide_channels(p, offset, copied_bytes, d);
  for (int64_t group = 0; group < p.groups; ++group)
    for (int64_t c = group * p.group_channels(); c < (group + 1) * p.group_channels(); c += channels) {
      const int64_t end = std::min((group + 1) * p.group_channels(), c + channels);
      const size_t first = d.steps.size();
      for (DepthStep& step : depth_steps(p, c, end, kMaxDepth)) {
        d.max_depth = std::max(d.max_depth, step.size());
        d.steps.push_back(std::move(step));
      }
      const int64_t first_group = c / p.offset_group_channels(), last_group = (end - 1) / p.offset_group_channels();
      d.chunks.push_back({c, end, group, first, d.steps.size(), first_group * p.taps(), (last_group + 1) * p.taps()});
      d.max_channels = std::max(d.max_channels, end - c);
      d.max_planes = std::max(d.max_planes, d.chunks.back().planes());
    }
  d.workers = std::min<int64_t>(d.workers, static_cast<int64_t>(d.chunks.size()));
  const int64_t row_bytes = 2 * (p.group_outputs() + d.max_depth) * static_cast<int64_t>(sizeof(A));
  const int64_t sum_bytes = d.workers * d.max_planes * sum_planes * static_cast<int64_t>(sizeof(A));
  const int64_t sums = sum_bytes ? kMaxSums / sum_bytes : INT64_MAX;  // positions
  d.block = std::max<int64_t>(2, std::min(kCacheBytes / row_bytes, sums) / 28) *
            28;  // even, and a multiple of the tile height 14
  d.block = std::min(d.block, round_up(p.positions(), 2));
  d.stretch = std::max<int64_t>(1, std::min(sums, p.positions()) / d.block) * d.block;
  return d;
}

}  // namespace dcnseg_ops
