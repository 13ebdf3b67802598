// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include <kvferry/kit/attempts.hpp>
#include <kvferry/kit/stream_protocol.hpp>
#include <kvferry/kit/transfer_channel_kit.hpp>

namespace unix_transport {

class UnixLink;

/// Moves pages over Unix-domain sockets, between processes of one user on one host.
class UnixTransferChannel : public kvferry::kit::TransferChannelKit {
 public:
  /// @throws kvferry::TransferError as `TransferChannelKit` does; `errc::not_supported` for a region of a dma-buf.
  explicit UnixTransferChannel(kvferry::ChannelOptions options);
  ~UnixTransferChannel() override;

  [[nodiscard]] std::string_view transport() const noexcept override { return "unix"; }
  [[nodiscard]] kvferry::Capabilities capabilities() const noexcept override {
    return kvferry::kit::stream_capabilities;
  }

 protected:
  [[nodiscard]] std::unique_ptr<kvferry::kit::Dial> dial(const std::string& peer_id) override;
  [[nodiscard]] kvferry::Bytes accept(std::shared_ptr<kvferry::kit::LinkHost> host,
                                      const kvferry::Bytes& remote_endpoint, kvferry::kit::Clock::time_point deadline,
                                      kvferry::kit::LinkHandler on_link) override;
  void stop_listening() override;

 private:
  const std::shared_ptr<kvferry::kit::Attempts<UnixLink>> attempts_ =
      std::make_shared<kvferry::kit::Attempts<UnixLink>>();
};

}  // namespace unix_transport
