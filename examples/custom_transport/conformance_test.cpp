// SPDX-License-Identifier: Apache-2.0
// kvferry's conformance suite, put to this transport.
#include <memory>
#include <string_view>
#include <utility>

#include <kvferry/testing/conformance.hpp>
#include <kvferry/testing/run_main.hpp>

#include "unix_transfer_channel.hpp"

namespace {

using unix_transport::UnixTransferChannel;

struct UnixTraits {
  static constexpr std::string_view name = "Unix";
  static constexpr bool reconnects = true;
  static constexpr bool notices_blocking_in_handler = true;

  static std::unique_ptr<kvferry::BaseTransferChannel> make_channel(kvferry::ChannelOptions options) {
    return std::make_unique<UnixTransferChannel>(std::move(options));
  }
  static std::unique_ptr<kvferry::BaseTransferChannel> make_answering_channel(
      kvferry::ChannelOptions options, kvferry::testing::SideMessageAnswer answer) {
    return std::make_unique<kvferry::testing::AnsweringChannel<UnixTransferChannel>>(std::move(answer),
                                                                                     std::move(options));
  }
};

}  // namespace

KVFERRY_INSTANTIATE_CONFORMANCE_SUITE(Unix, UnixTraits);

int main(int argc, char** argv) { return kvferry::testing::run_main(argc, argv); }
