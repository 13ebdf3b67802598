// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/use_future.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include <kvferry/tcp_transfer_channel.hpp>

#include "fuzz/guarded_memory.hpp"
#include "fuzz/input.hpp"

namespace kvferry::inline KVFERRY_ABI::fuzz {

/// A channel that a lying peer attacks, and an honest peer that works with it all the while and must notice nothing.
class AttackedChannel {
 public:
  static constexpr std::size_t page = 4096;
  static constexpr std::size_t pages = 4;
  /// That the honest peer writes to and nobody else, by agreement: it is open to all.
  static constexpr std::uint32_t honest_region = 4;
  static constexpr std::string_view secret = "no peer may read this.";
  static constexpr std::chrono::seconds patience{30};

  AttackedChannel() : channel(options()), honest_memory_(pages * page, "honest"), honest_(honest_options()) {
    honest_.lazy_init_peer_connection("honest", "attacked", channel.peer_init_url());
    thread_ = std::thread([this] { work(); });
  }
  AttackedChannel(const AttackedChannel&) = delete;
  AttackedChannel& operator=(const AttackedChannel&) = delete;
  ~AttackedChannel() {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  /// Has the honest peer do its work once more, meanwhile.
  void disturb() {
    const std::lock_guard lock(mutex_);
    wanted_ = done_ + 1;
    changed_.notify_all();
  }
  /// Waits until it has.
  void settle() {
    std::unique_lock lock(mutex_);
    require(changed_.wait_for(lock, 4 * patience, [&] { return done_ >= wanted_; }), "the honest peer gets on");
  }

  // Of regions 0 to 3, what peers may do: all, nothing, read, write; and the honest peer's.
  std::array<GuardedMemory, 5> regions{GuardedMemory(pages * page, "open to peers"), GuardedMemory(pages* page, secret),
                                       GuardedMemory(pages* page, "to be read"), GuardedMemory(pages* page, secret),
                                       GuardedMemory(pages* page, "the honest one's")};
  TcpTransferChannel channel;

 private:
  TcpOptions options() {
    constexpr std::array accesses{Access::read_write, Access::none, Access::read, Access::write, Access::read_write};
    TcpOptions made;
    for (std::size_t i = 0; i < regions.size(); ++i) {
      made.regions.push_back({regions[i].bytes().data(), regions[i].size(), page, accesses[i]});
    }
    made.peer_init_url = "tcp://127.0.0.1:0";
    made.lanes_per_peer = 3;
    made.stripe_threshold = 2 * page;
    made.drain_timeout = std::chrono::milliseconds(20);
    made.hello_timeout = std::chrono::milliseconds(200);
    made.require_equal_page_sizes = false;
    made.log_sink = [](const LogRecord&) {};
    return made;
  }

  TcpOptions honest_options() {
    TcpOptions made;
    made.regions = {{honest_memory_.bytes().data(), honest_memory_.size(), page}};
    made.peer_init_url = "tcp://127.0.0.1:0";
    made.require_equal_page_sizes = false;
    made.log_sink = [](const LogRecord&) {};
    return made;
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return ending_ || done_ < wanted_; });
      if (ending_) {
        return;
      }
      lock.unlock();
      round();
      lock.lock();
      ++done_;
      changed_.notify_all();
    }
  }

  /// One of each operation, and each byte looked at.
  void round() {
    ++serial_;
    const std::vector<std::uint64_t> indexes{2, 0};
    std::vector<std::byte> data(2 * page);
    std::vector<std::byte> back(2 * page);
    const auto objects = [&](std::vector<std::byte>& bytes) {
      return std::vector<MutableBuffer>{MutableBuffer(bytes).first(page), MutableBuffer(bytes).last(page)};
    };
    const auto stamp = [&](std::uint64_t salt) {
      for (std::size_t i = 0; i < data.size(); ++i) {
        data[i] = static_cast<std::byte>((serial_ * 31 + salt) * (i / 64 + 7) + i);
      }
    };
    const auto expect = [&](const std::vector<std::byte>& bytes) {
      require(bytes == data, "the honest peer finds its own bytes");
    };
    const TransferSpec to_region{
        .peer_id = "attacked", .remote_indexes = indexes, .remote_region = honest_region, .timeout = patience};
    const TransferSpec to_honest{.peer_id = "honest", .remote_indexes = indexes, .timeout = patience};

    stamp(1);
    succeeds(
        "write", [&](TransferSpec spec, std::error_code& ec) { honest_.batched_write(objects(data), spec, ec); },
        to_region);
    succeeds(
        "read", [&](TransferSpec spec, std::error_code& ec) { honest_.batched_read(objects(back), spec, ec); },
        to_region);
    expect(back);
    stamp(2);
    succeeds(
        "write to it", [&](TransferSpec spec, std::error_code& ec) { channel.batched_write(objects(data), spec, ec); },
        to_honest);
    const auto there = honest_memory_.bytes();
    require(std::ranges::equal(there.subspan(2 * page, page), std::span(data).first(page)) &&
                std::ranges::equal(there.first(page), std::span(data).last(page)),
            "the honest peer has what was written to it");
    stamp(3);
    auto received = honest_.async_batched_recv(
        objects(back), {.peer_id = "attacked", .tag = serial_, .timeout = patience}, asio::use_future);
    succeeds("send to it",
             [&](TransferSpec spec, std::error_code& ec) { channel.batched_send(objects(data), spec, ec); },
             {.peer_id = "honest", .tag = serial_, .timeout = patience});
    require(received.get() == 2, "the honest peer receives what is sent");
    expect(back);
  }

  template <class Call>
  static void succeeds(const char* what, Call call, TransferSpec spec) {
    std::string why;
    std::error_code ec;
    spec.diagnostic = &why;
    call(spec, ec);
    if (ec) {
      std::fprintf(stderr, "the honest peer's %s: %s: %s\n", what, ec.message().c_str(), why.c_str());
      std::abort();
    }
  }

  GuardedMemory honest_memory_;
  TcpTransferChannel honest_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t wanted_ = 0;
  std::uint64_t done_ = 0;
  std::uint64_t serial_ = 0;
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace kvferry::fuzz
