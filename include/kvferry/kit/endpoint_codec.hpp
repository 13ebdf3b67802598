// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_ENDPOINT_CODEC_HPP
#define KVFERRY_KIT_ENDPOINT_CODEC_HPP

#include <system_error>

#include <kvferry/side_message_codec.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

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

#endif  // KVFERRY_KIT_ENDPOINT_CODEC_HPP
