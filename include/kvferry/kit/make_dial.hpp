// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_MAKE_DIAL_HPP
#define KVFERRY_KIT_MAKE_DIAL_HPP

#include <memory>
#include <utility>

#include <kvferry/kit/link.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Makes a `Dial` of two parts, for transports without state between the two.
/// @param local_endpoint this side's, for the handshake's request; may be empty.
/// @param connect called as `Dial::connect` is, with the same arguments, at most once; must not block, may throw
///   `TransferError` before it has called the `LinkHandler`. It lives as long as the dial: its captures must not call
///   into the channel when they are destroyed.
template <class Connect>
[[nodiscard]] std::unique_ptr<Dial> make_dial(Bytes local_endpoint, Connect connect) {
  class FunctionDial final : public Dial {
   public:
    FunctionDial(Bytes endpoint, Connect function) : endpoint_(std::move(endpoint)), connect_(std::move(function)) {}

    [[nodiscard]] Bytes local_endpoint() override { return endpoint_; }
    void connect(std::shared_ptr<LinkHost> host, const Bytes& remote_endpoint, Clock::time_point deadline,
                 LinkHandler on_link) override {
      connect_(std::move(host), remote_endpoint, deadline, std::move(on_link));
    }

   private:
    const Bytes endpoint_;
    Connect connect_;
  };
  return std::make_unique<FunctionDial>(std::move(local_endpoint), std::move(connect));
}

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_MAKE_DIAL_HPP
