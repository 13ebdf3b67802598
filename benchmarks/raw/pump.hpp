// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/program.hpp"
#include "lane.hpp"

namespace bench {

/// A thread's end of a stream: its lanes, and which of the region's pages each batch has. Each batch is spread over all
/// lanes. Nothing but the pages travels, since both sides know the order in which they come: that is less than any
/// transfer library can do with.
class Pump {
 public:
  Pump(const Setup& setup, const LaneOptions& options, std::size_t stream, bool at_target, std::vector<Lane> lanes)
      : map_(setup.map),
        region_(setup.region),
        stream_(stream),
        at_target_(at_target),
        sends_pages_(setup.job.target_is_source() == at_target),
        blocking_(options.blocking()),
        lanes_(std::move(lanes)),
        idling_(options, sends_pages_),
        started_(setup.job.depth) {
    if (setup.job.batch < lanes_.size()) {
      throw std::invalid_argument("a batch needs a page for each lane");
    }
  }

  /// The initiator's end: moves batches, up to `started_.size()` at a time, until the stream has enough.
  void initiate(Stream& stream) {
    auto now = Clock::now();
    for (;;) {
      while (issued_ - completed_ < started_.size() && stream.next(now)) {
        started_[issued_++ % started_.size()] = now;
        if (!sends_pages_) {
          std::ranges::for_each(lanes_, &Lane::send_token);
        }
      }
      if (issued_ == completed_) {
        return;
      }
      bool worked = false;
      for (std::size_t i = 0; i < lanes_.size(); ++i) {
        worked = (sends_pages_ ? send_part(i, issued_) : receive_part(i, issued_)) || worked;
      }
      idling_.after(worked, lanes_);
      for (const auto all = through_everywhere(); completed_ < all; ++completed_) {
        now = Clock::now();
        stream.completed(started_[completed_ % started_.size()], now);
      }
    }
  }

  /// The target's end: does what the other end does, until that has shut all lanes.
  void serve() {
    while (!std::ranges::all_of(lanes_, &Lane::ended)) {
      bool worked = false;
      for (std::size_t i = 0; i < lanes_.size(); ++i) {
        if (!lanes_[i].ended()) {
          worked = (sends_pages_ ? answer_requests(i) : receive_and_acknowledge(i)) || worked;
        }
      }
      idling_.after(worked, lanes_);
    }
  }

  void shut() { std::ranges::for_each(lanes_, &Lane::shut); }

 private:
  bool send_part(std::size_t i, std::uint64_t issued) {
    Lane& lane = lanes_[i];
    bool worked = load(i, issued) && lane.send_pages(blocking_);
    if (!lane.busy() || started_.size() > 1) {
      worked = lane.receive_tokens(blocking_ && !lane.busy() && lane.loaded() == issued) || worked;
      expect_open(lane);
    }
    return worked;
  }

  bool receive_part(std::size_t i, std::uint64_t issued) {
    const bool worked = load(i, issued) && lanes_[i].receive_pages(blocking_);
    expect_open(lanes_[i]);
    return worked;
  }

  bool answer_requests(std::size_t i) {
    Lane& lane = lanes_[i];
    return load(i, lane.tokens()) ? lane.send_pages(blocking_) : lane.receive_tokens(blocking_);
  }

  bool receive_and_acknowledge(std::size_t i) {
    Lane& lane = lanes_[i];
    load(i, UINT64_MAX);
    const bool worked = lane.receive_pages(blocking_);
    if (!lane.busy()) {
      lane.send_token();
    }
    return worked;
  }

  /// Begins the next batch of those before `limit`, if the lane is free. @return whether one is under way.
  bool load(std::size_t i, std::uint64_t limit) {
    Lane& lane = lanes_[i];
    if (!lane.busy() && lane.loaded() < limit) {
      const auto batch =
          at_target_ ? map_.target_pages(stream_, lane.loaded()) : map_.initiator_pages(stream_, lane.loaded());
      const std::size_t first = batch.size() * i / lanes_.size();
      const std::size_t last = batch.size() * (i + 1) / lanes_.size();
      const std::uint64_t first_page = at_target_ ? map_.peer_of(stream_) * map_.pages_per_peer() : 0;
      lane.load(PageCursor(region_, first_page, batch.subspan(first, last - first)));
    }
    return lane.busy();
  }

  /// How many batches are where they belong with all of their parts.
  [[nodiscard]] std::uint64_t through_everywhere() const {
    std::uint64_t least = UINT64_MAX;
    for (const auto& lane : lanes_) {
      least = std::min(least, sends_pages_ ? lane.tokens() : lane.finished());
    }
    return least;
  }

  static void expect_open(const Lane& lane) {
    if (lane.ended()) {
      throw std::runtime_error("the target closed the connection");
    }
  }

  const PageMap& map_;
  const Region& region_;
  std::size_t stream_;
  bool at_target_;
  bool sends_pages_;
  bool blocking_;
  std::vector<Lane> lanes_;
  Idling idling_;
  std::vector<Clock::time_point> started_;
  std::uint64_t issued_ = 0;
  std::uint64_t completed_ = 0;
};

}  // namespace bench
