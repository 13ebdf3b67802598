// SPDX-License-Identifier: Apache-2.0
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include <kvferry/side_message.hpp>
#include <kvferry/side_message_codec.hpp>

namespace {

/// One field of every kind that can be decoded.
struct Everything {
  std::string text;
  kvferry::Bytes blob;
  std::int16_t number = 0;
  double real = 0;
  bool flag = false;
  std::optional<std::uint64_t> maybe;
  std::vector<std::tuple<std::uint64_t, std::string>> list;
  std::map<std::string, std::vector<float>> table;

  static constexpr std::string_view side_message_type = "E";
  static constexpr auto side_message_fields() {
    using kvferry::side_message_field;
    return std::tuple(side_message_field("t", &Everything::text), side_message_field("b", &Everything::blob),
                      side_message_field("n", &Everything::number), side_message_field("r", &Everything::real),
                      side_message_field("f", &Everything::flag), side_message_field("m", &Everything::maybe),
                      side_message_field("l", &Everything::list), side_message_field("d", &Everything::table));
  }
};

/// A message that can be decoded encodes to one that decodes to the same.
template <class Message>
void decode(const kvferry::SideMessage& message) {
  std::error_code ec;
  const auto decoded = kvferry::decode_side_message<Message>(message, ec);
  if (ec) {
    return;
  }
  const auto encoded = kvferry::encode_side_message(decoded);
  const auto again = kvferry::encode_side_message(kvferry::decode_side_message<Message>(encoded));
  if (encoded != again) {
    std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto frame = std::as_bytes(std::span(data, size));
  std::error_code ec;
  const auto message = kvferry::parse_side_message(frame, ec);
  if (ec) {
    // A frame that can't be parsed can't be decoded either.
    kvferry::SideMessage unparsed("E", kvferry::Bytes(frame.begin(), frame.end()));
    std::ignore = kvferry::decode_side_message<Everything>(unparsed, ec);
    if (!ec) {
      std::abort();
    }
    return 0;
  }
  decode<kvferry::P2PInitSideMsg>(message);
  decode<kvferry::P2PInitSideRetMsg>(message);
  decode<kvferry::PySocketInitRequest>(message);
  decode<kvferry::PySocketInitResponse>(message);
  decode<kvferry::SideMessageError>(message);
  decode<Everything>(message);
  return 0;
}
