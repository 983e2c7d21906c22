// The depth of the products, taps times channels, cut into steps that fit the caches.
//
// A step has some taps of some channels of one convolution group; its columns are ordered [tap][channel]. The
// forward takes all taps of few channels at a time (chunk_steps): pixels of a chunk lie side by side in its copy of
// the input, and those that neighbouring taps and positions share stay in the nearest cache.
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

// The channels of each convolution group, cut into `count` chunks of `channels` at most.
struct ChannelChunks {
  int64_t group_channels, channels, count;

  // The chunk that channel c of the input is in.
  int64_t index(int64_t c) const { return c / group_channels * count + c % group_channels / channels; }
  int64_t begin(int64_t chunk) const { return chunk / count * group_channels + chunk % count * channels; }
  int64_t end(int64_t chunk) const { return std::min(begin(chunk) + channels, (chunk / count + 1) * group_channels); }
};

constexpr int64_t kMostPlans = 64;   // of a step: one for each tap and offset group, of some kilobytes
constexpr int64_t kLeastChunk = 16;  // channels: a vector of them

// Chunks whose taps together make at most `most` columns, where that leaves a vector of channels.
inline ChannelChunks channel_chunks(const DeformConvParams& p, int64_t most) {
  const int64_t fit = std::max(kLeastChunk, most / p.taps() / kLeastChunk * kLeastChunk);
  const int64_t channels = std::min({fit, p.group_channels(), kMostPlans * p.offset_group_channels()});
  return {p.group_channels(), channels, (p.group_channels() + channels - 1) / channels};
}

// Steps of at most `most` columns for channels [begin, end) of one convolution group: several taps of few
// channels, or one tap of a part of many channels. Never less than one tap and one channel.
inline std::vector<DepthStep> depth_steps(const DeformConvParams& p, int64_t begin, int64_t end, int64_t most) {
  const int64_t channels = end - begin;
  most = std::min(most, kMostPlans * p.offset_group_channels());
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

// Steps of all taps of a chunk, or of as many as make `most` columns and kMostPlans plans, for all of a convolution
// group.
inline std::vector<DepthStep> chunk_steps(const DeformConvParams& p, const ChannelChunks& chunks, int64_t group,
                                          int64_t most) {
  std::vector<DepthStep> steps;
  for (int64_t chunk = group * chunks.count; chunk < (group + 1) * chunks.count; ++chunk) {
    const int64_t begin = chunks.begin(chunk), end = chunks.end(chunk);
    const std::vector<Segment> segments = segments_of(p, begin, end);
    const int64_t plans = static_cast<int64_t>(segments.size());
    const int64_t fit = std::max<int64_t>(1, std::min(most / (end - begin), kMostPlans / plans));
    const int64_t rounds = (p.taps() + fit - 1) / fit;
    for (int64_t round = 0; round < rounds; ++round)
      steps.push_back({round * p.taps() / rounds, (round + 1) * p.taps() / rounds, begin, end, segments});
  }
  return steps;
}

}  // namespace dcnseg_ops
