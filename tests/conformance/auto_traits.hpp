// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include <kvferry/auto_transfer_channel.hpp>
#include <kvferry/error.hpp>
#include <kvferry/kit/make_dial.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/testing/traits.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Makes channels of several roads, those of `Derived`.
template <class Derived>
struct AutoTraits {
  static constexpr bool reconnects = true;
  static constexpr bool notices_blocking_in_handler = true;

  static std::unique_ptr<BaseTransferChannel> make_channel(ChannelOptions options) {
    return std::make_unique<AutoTransferChannel>(auto_options(std::move(options)));
  }

  static std::unique_ptr<BaseTransferChannel> make_answering_channel(ChannelOptions options, SideMessageAnswer answer) {
    return std::make_unique<AnsweringChannel<AutoTransferChannel>>(std::move(answer), auto_options(std::move(options)));
  }

 private:
  [[nodiscard]] static AutoOptions auto_options(ChannelOptions options) {
    AutoOptions result;
    static_cast<ChannelOptions&>(result) = std::move(options);
    result.roads = Derived::roads();
    return result;
  }
};

struct AutoOverShm : AutoTraits<AutoOverShm> {
  static constexpr std::string_view name = "OverShm";
  static std::vector<AutoRoad> roads() { return AutoTransferChannel::default_roads(); }
};

/// Offered by both sides, and never gets through.
class BlockedChannel : public ShmTransferChannel {
 public:
  using ShmTransferChannel::ShmTransferChannel;

 protected:
  [[nodiscard]] std::unique_ptr<kit::Dial> dial(const std::string&) override {
    return kit::make_dial({}, [](const auto&, const auto&, auto, auto on_link) {
      on_link(std::make_error_code(std::errc::connection_refused), nullptr, "the road is blocked");
    });
  }
};

/// Each connection falls to the second road.
struct AutoOverTcp : AutoTraits<AutoOverTcp> {
  static constexpr std::string_view name = "OverTcp";
  static std::vector<AutoRoad> roads() {
    return {road<BlockedChannel>("blocked", ShmOptions()), AutoTransferChannel::default_roads().at(1)};
  }
};

}  // namespace kvferry::testing
