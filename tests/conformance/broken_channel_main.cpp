// SPDX-License-Identifier: Apache-2.0
//
// The conformance suite for a channel that is broken as KVFERRY_TESTING_FAULT says; broken_channels_test.cpp runs it.
#include <chrono>
#include <cstdlib>
#include <memory>
#include <string_view>
#include <utility>

#include <kvferry/tcp_transfer_channel.hpp>
#include <kvferry/testing/conformance_transports.hpp>

#include "conformance/broken_channel.hpp"
#include "conformance/faults.hpp"

namespace kvferry::inline KVFERRY_ABI::testing {

struct Broken {
  static constexpr std::string_view name = "Channel";
  /// Events are lost here on purpose, and need not be waited for as long; unless there is no fault.
  static inline const std::chrono::milliseconds wait_limit = requested_fault() == Fault::none
                                                                 ? TraitsFacts().wait_limit
                                                                 : std::chrono::milliseconds(sanitized ? 15'000 : 5000);
  static constexpr bool reconnects = true;

  static std::unique_ptr<BaseTransferChannel> make_channel(ChannelOptions options) {
    TcpOptions tcp;
    static_cast<ChannelOptions&>(tcp) = std::move(options);
    return std::make_unique<BrokenChannel>(std::make_unique<TcpTransferChannel>(std::move(tcp)), requested_fault());
  }
};

}  // namespace kvferry::testing

KVFERRY_INSTANTIATE_CONFORMANCE_SUITE(Broken, Broken);

int main(int argc, char** argv) {
  const bool may_lack_capabilities = std::getenv("KVFERRY_TESTING_LACKS_NOTHING") == nullptr;
  return kvferry::testing::run_main(argc, argv, {.may_lack_capabilities = may_lack_capabilities});
}
