// Checks the division of the depth of generated convolutions into steps: each tap of each channel is in one step,
// steps and chunks respect their limits, and the steps of all convolution groups are the same. Prints errors; returns
// 1 then.
#include "cpu/conv/depth_steps.h"
#include "oracle.h"

using Steps = std::vector<DepthStep>;

// Whether the steps contain each tap of channels [begin, end) once, at most `most` columns, and the channels'
// segments.
static bool cover(const DeformConvParams& p, const Steps& steps, int64_t begin, int64_t end, int64_t most) {
  std::vector<int> taken(static_cast<size_t>((end - begin) * p.taps()));
  for (const DepthStep& step : steps) {
    if (step.size() < 1 || (step.size() > most && step.taps() > 1)) return false;
    int64_t at = step.channel_begin;
    for (const Segment& segment : step.segments) {
      if (segment.begin != at || segment.end <= at) return false;
      for (; at < segment.end; ++at) {
        if (at < begin || at >= end || segment.offset_group != at / p.offset_group_channels()) return false;
        for (int64_t t = step.tap_begin; t < step.tap_end; ++t)
          if (t < 0 || t >= p.taps() || taken[(at - begin) * p.taps() + t]++) return false;
      }
    }
    if (at != step.channel_end) return false;
  }
  return std::all_of(taken.begin(), taken.end(), [](int times) { return times == 1; });
}

static bool check_forward(const DeformConvParams& p, int64_t most) {
  const ChannelChunks chunks = channel_chunks(p, most);
  const std::vector<Steps> steps = chunk_steps(p, chunks, most);
  if (static_cast<int64_t>(steps.size()) != p.groups || !are_alike(p, steps)) return false;
  for (int64_t group = 0; group < p.groups; ++group) {
    const int64_t begin = group * p.group_channels(), end = begin + p.group_channels();
    if (!cover(p, steps[group], begin, end, most)) return false;
    for (const DepthStep& step : steps[group]) {
      const int64_t chunk = chunks.index(step.channel_begin), plans = step.taps() * step.offset_groups();
      if (step.channel_begin != chunks.begin(chunk) || step.channel_end != chunks.end(chunk)) return false;
      if (plans > kMaxPlans && step.taps() > 1) return false;
    }
  }
  return true;
}

// For one chunk of channels of a group.
static bool check_backward(const DeformConvParams& p, int64_t most) {
  const int64_t group = pick(0, static_cast<int>(p.groups) - 1), size = p.group_channels();
  const int64_t begin = group * size + pick(0, static_cast<int>(size) - 1);
  const int64_t end = pick(static_cast<int>(begin) + 1, static_cast<int>((group + 1) * size));
  return cover(p, depth_steps(p, begin, end, most), begin, end, most);
}

int main() {
  for (int i = 0; i < 20000; ++i) {
    const DeformConvParams p = pick_sizes(1);
    const int64_t most = int64_t(12) << pick(0, 7);  // columns
    if (check_forward(p, most) && check_backward(p, 32 * pick(1, 10))) continue;
    std::printf("%d channels in %d groups and %d offset groups, kernel %dx%d, %d columns\n", int(p.channels),
                int(p.groups), int(p.offset_groups), int(p.kernel_h), int(p.kernel_w), int(most));
    return 1;
  }
  return 0;
}
