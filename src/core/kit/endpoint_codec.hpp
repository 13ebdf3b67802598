// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <system_error>

#include <kvferry/side_message_codec.hpp>

namespace kvferry::kit {

/// A transport's endpoint is opaque to the handshake; inside, it is a message like any other.
template <class Endpoint>
[[nodiscard]] Bytes encode_endpoint(const Endpoint& endpoint) {
  return encode_side_message(endpoint).encoded();
}

template <class Endpoint>
[[nodiscard]] Endpoint decode_endpoint(const Bytes& bytes, std::error_code& ec) {
  const SideMessage message = parse_side_message(bytes, ec);
  return ec ? Endpoint() : decode_side_message<Endpoint>(message, ec);
}

}  // namespace kvferry::kit
