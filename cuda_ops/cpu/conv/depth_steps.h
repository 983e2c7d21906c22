// Division of the depth of the GEMM, taps times channels, into steps that fit in the caches.
//
// A step has some taps of some channels of one convolution group; its columns are ordered [tap][channel]. The forward
// processes all taps of few channels at a time (chunk_steps): the pixels of a chunk are contiguous in its copy of the
// input, and pixels that neighboring taps and positions share stay in the L1 cache.
#pragma once
#include <algorithm>
#include <vector>
#include "deform_conv_params.h"
namespace dcnseg_ops {

// Channels [begin, end) of one offset group.
struct Segment {
  int64_t begin, end, offset_group;
};

struct DepthStep {
  int64_t tap_begin, tap_end, channel_begin,
      channel_end;                // channels of the input
  std::vector<Segment> segments;  // of the channels

  int64_t taps() const { return tap_end - tap_begin; }
  int64_t channels() const { return channel_end - channel_begin; }
  int64_t size() const { return taps() * channels(); }
  int64_t first_offset_group() const { return segments.front().offset_group; }
  int64_t offset_groups() const { return segments.back().offset_group - first_offset_group() + 1; }
};

inline std::vector<Segment> segments_of(const DeformConvParams& p, int64_t begin, int64_t end) {
  std::vector<Segment> segments;
  const int64_t size = p.offset_group_channels();
  for (int64_t at = begin; at < end; at = segments.back().end)
    segments.push_back({at, std::min(end, (at / size + 1) * size), at / size});
  return segments;
}

// Divides the channels of each convolution group into `count` chunks of at most `channels` channels.
struct ChannelChunks {
  int64_t group_channels, channels, count;

  // The chunk of input channel c.
  int64_t index(int64_t c) const { return c / group_channels * count + c % group_channels / channels; }
  int64_t begin(int64_t chunk) const { return chunk / count * group_channels + chunk % count * channels; }
  int64_t end(int64_t chunk) const { return std::min(begin(chunk) + channels, (chunk / count + 1) * group_channels); }
};

constexpr int64_t kMaxPlans = 64;  // per step: one for each tap and offset group, of a few kilobytes
constexpr int64_t kMinChunk = 16;  // channels: one vector

// Chunks whose taps make at most `most` columns, but at least one vector of channels.
inline ChannelChunks channel_chunks(const DeformConvParams& p, int64_t most) {
  const int64_t fit = std::max(kMinChunk, most / p.taps() / kMinChunk * kMinChunk);
  const int64_t channels = std::min({fit, p.group_channels(), kMaxPlans * p.offset_group_channels()});
  return {p.group_channels(), channels, (p.group_channels() + channels - 1) / channels};
}

// Steps of at most `most` columns for channels [begin, end) of one convolution group: several taps of few channels, or
// one tap of some of many channels. At least one tap and one channel.
inline std::vector<DepthStep> depth_steps(const DeformConvParams& p, int64_t begin, int64_t end, int64_t most) {
  const int64_t channels = end - begin;
  most = std::min(most, kMaxPlans * p.offset_group_channels());
  const int64_t parts = (channels + most - 1) / most, part = ((channels + parts - 1) / parts + 31) / 32 * 32;
  const int64_t fit = std::max<int64_t>(1, most / channels), rounds = (p.taps() + fit - 1) / fit;
  std::vector<DepthStep> steps;
  for (int64_t round = 0; round < rounds; ++round)
    for (int64_t at = begin; at < end; at += part) {
      const int64_t last = std::min(end, at + part);
      steps.push_back({round * p.taps() / rounds, (round + 1) * p.taps() / rounds, at, last, segments_of(p, at, last)});
    }
  return steps;
}

// Steps for each convolution group: all taps of a chunk, or as many as fit in `most` columns and kMaxPlans plans.
//
// The steps of all groups are the same except for their first channels and segments, because the weight is packed by
// the steps of the first group. A chunk may have more segments in one group than in another; the maximum determines
// the number of taps per step in all groups.
inline std::vector<std::vector<DepthStep>> chunk_steps(const DeformConvParams& p, const ChannelChunks& chunks,
                                                       int64_t most) {
  std::vector<std::vector<DepthStep>> steps(static_cast<size_t>(p.groups));
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    std::vector<DepthStep> whole;  // all taps of the chunk, per group
    int64_t plans = 1;             // per tap
    for (int64_t group = 0; group < p.groups; ++group) {
      const int64_t begin = chunks.begin(group * chunks.count + chunk), end = chunks.end(group * chunks.count + chunk);
      whole.push_back({0, p.taps(), begin, end, segments_of(p, begin, end)});
      plans = std::max(plans, static_cast<int64_t>(whole.back().segments.size()));
    }
    const int64_t fit = std::max<int64_t>(1, std::min(most / whole[0].channels(), kMaxPlans / plans));
    const int64_t rounds = (p.taps() + fit - 1) / fit;
    for (int64_t round = 0; round < rounds; ++round)
      for (size_t group = 0; group < whole.size(); ++group) {
        steps[group].push_back(whole[group]);
        steps[group].back().tap_begin = round * p.taps() / rounds;
        steps[group].back().tap_end = (round + 1) * p.taps() / rounds;
      }
  }
  return steps;
}

// Whether the steps of all groups are the same, see `chunk_steps`.
inline bool are_alike(const DeformConvParams& p, const std::vector<std::vector<DepthStep>>& steps) {
  for (size_t group = 0; group < steps.size(); ++group) {
    const int64_t first_channel = static_cast<int64_t>(group) * p.group_channels();
    if (steps[group].size() != steps[0].size()) return false;
    for (size_t i = 0; i < steps[0].size(); ++i) {
      const DepthStep &step = steps[group][i], &first = steps[0][i];
      if (step.tap_begin != first.tap_begin || step.tap_end != first.tap_end ||
          step.channel_begin != first.channel_begin + first_channel ||
          step.channel_end != first.channel_end + first_channel)
        return false;
    }
  }
  return true;
}

}  // namespace dcnseg_ops
