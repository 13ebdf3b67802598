// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string_view>
#include <utility>

#include <kvferry/rdma_transfer_channel.hpp>
#include <kvferry/testing/traits.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Makes RDMA channels on the first `Rails` active ports of this machine.
template <class Derived, std::size_t Rails>
struct RdmaTraits {
  static constexpr bool reconnects = true;
  static constexpr bool notices_blocking_in_handler = true;
  /// The devices may be emulated ones, in a machine that is emulated, too. Less than what no test takes.
  static constexpr std::chrono::milliseconds wait_limit{100'000};

  static void configure(RdmaOptions&) {}

  static std::unique_ptr<BaseTransferChannel> make_channel(ChannelOptions options) {
    return std::make_unique<RdmaTransferChannel>(rdma_options(std::move(options)));
  }

  static std::unique_ptr<BaseTransferChannel> make_answering_channel(ChannelOptions options, SideMessageAnswer answer) {
    return std::make_unique<AnsweringChannel<RdmaTransferChannel>>(std::move(answer), rdma_options(std::move(options)));
  }

 private:
  [[nodiscard]] static RdmaOptions rdma_options(ChannelOptions options) {
    RdmaOptions result;
    static_cast<ChannelOptions&>(result) = std::move(options);
    result.rails = RdmaTransferChannel::active_rails();
    if (result.rails.size() < Rails) {
      throw std::runtime_error("too few active RDMA ports");
    }
    result.rails.resize(Rails);
    Derived::configure(result);
    return result;
  }
};

struct OneRail : RdmaTraits<OneRail, 1> {
  static constexpr std::string_view name = "OneRail";
};

struct TwoRails : RdmaTraits<TwoRails, 2> {
  static constexpr std::string_view name = "TwoRails";
  static void configure(RdmaOptions& options) {
    // So that ordinary batches are striped, too.
    options.stripe_threshold = 2048;
    options.poll.spin = std::chrono::microseconds(50);
    // So that regions have several slices, with pages on their borders.
    options.slice_bytes = std::size_t{100} << 10;
    options.checksums = true;
  }
};

/// Several queue pairs on each rail.
struct QueuePairs : RdmaTraits<QueuePairs, 2> {
  static constexpr std::string_view name = "QueuePairs";
  static void configure(RdmaOptions& options) {
    // So that batches go over one rail's, and over all.
    options.queue_pairs_per_rail = 3;
    options.queue_pair_threshold = 1024;
    options.stripe_threshold = std::size_t{64} << 10;
  }
};

/// Each peer with registrations of its own: what connections, regions and memory have to do with.
struct IsolatedPeers : RdmaTraits<IsolatedPeers, 2> {
  static constexpr std::string_view name = "IsolatedPeers";
  static constexpr bool takes(std::string_view suite) {
    constexpr std::array suites{std::string_view("Regions"),      std::string_view("ClosingTest"),
                                std::string_view("LifecycleTest"), std::string_view("OneSidedTest"),
                                std::string_view("PairedTest"),    std::string_view("PeersTest")};
    return std::ranges::find(suites, suite) != suites.end();
  }
  static void configure(RdmaOptions& options) {
    options.stripe_threshold = 2048;
    options.isolate_peers = true;
  }
};

}  // namespace kvferry::testing
