// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <memory>
#include <string_view>
#include <utility>

#include <kvferry/shared_region.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/testing/traits.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Makes channels within this host whose options `Derived::configure` may change.
template <class Derived>
struct ShmTraits {
  static constexpr bool reconnects = true;
  static constexpr bool notices_blocking_in_handler = true;

  static std::unique_ptr<BaseTransferChannel> make_channel(ChannelOptions options) {
    return std::make_unique<ShmTransferChannel>(shm_options(std::move(options)));
  }

  static std::unique_ptr<BaseTransferChannel> make_answering_channel(ChannelOptions options, SideMessageAnswer answer) {
    return std::make_unique<AnsweringChannel<ShmTransferChannel>>(std::move(answer), shm_options(std::move(options)));
  }

 private:
  [[nodiscard]] static ShmOptions shm_options(ChannelOptions options) {
    ShmOptions result;
    static_cast<ChannelOptions&>(result) = std::move(options);
    Derived::configure(result);
    return result;
  }
};

/// All payload is read from the peer's memory.
struct ProcessMemory : ShmTraits<ProcessMemory> {
  static constexpr std::string_view name = "ProcessMemory";
  static void configure(ShmOptions& options) { options.process_memory_threshold = 1; }
};

struct SocketAlone : ShmTraits<SocketAlone> {
  static constexpr std::string_view name = "SocketAlone";
  static void configure(ShmOptions& options) {
    options.process_memory = false;
    options.poll = PollPolicy::never();
    options.io_threads = 2;
  }
};

/// Objects and pages lie in memory that peers map; nothing else of the process is read.
struct SharedRegions : ShmTraits<SharedRegions> {
  static constexpr std::string_view name = "SharedRegions";
  static void configure(ShmOptions& options) {
    options.process_memory = false;
    options.process_memory_threshold = 1;
    // Else objects would not be mapped.
    if (!options.regions.empty() && options.regions.back().peer_access == Access::none) {
      options.regions.back().peer_access = Access::read;
    }
  }
  /// Suites that touch payload, or end something that does.
  static bool takes(std::string_view suite) {
#ifndef KVFERRY_TESTING_THREAD_SANITIZED  // which has nothing to find in where bytes go
    if (suite == "BatchesTest" || suite == "RangesTest") {
      return true;
    }
#endif
    constexpr std::array<std::string_view, 9> suites{"CancellationTest",  "Checksums",    "ConcurrencyTest",
                                                     "EndingTest",        "OneSidedTest", "OrderingTest",
                                                     "NotificationsTest", "PairedTest",   "Regions"};
    return std::ranges::find(suites, suite) != suites.end();
  }
  static std::shared_ptr<std::byte> allocate(std::size_t size) {
    const auto region = std::make_shared<SharedRegion>(size);
    return {region, region->data()};
  }
};

}  // namespace kvferry::testing
