// SPDX-License-Identifier: Apache-2.0
// Compiled with all warnings as errors: the public headers, those that a transport of the program's own takes, and templates of
// theirs.
#include <kvferry/auto_transfer_channel.hpp>
#include <kvferry/completion_queue.hpp>
#include <kvferry/kit/attempts.hpp>
#include <kvferry/kit/checks.hpp>
#include <kvferry/kit/endpoint_codec.hpp>
#include <kvferry/kit/make_dial.hpp>
#include <kvferry/kit/stream_protocol.hpp>
#include <kvferry/kit/transfer_channel_kit.hpp>
#include <kvferry/shared_region.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

#include <asio/use_future.hpp>

#include <cstdint>
#include <future>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace strict {

struct Measured {
  static constexpr std::string_view side_message_type = "Measured";
  double seconds = 0;
  float share = 0;
  std::int32_t count = 0;
  std::vector<std::uint64_t> pages;
  std::optional<std::string> text;

  static constexpr auto side_message_fields() {
    return std::tuple(
        kvferry::side_message_field("seconds", &Measured::seconds),
        kvferry::side_message_field("share", &Measured::share), kvferry::side_message_field("count", &Measured::count),
        kvferry::side_message_field("pages", &Measured::pages), kvferry::side_message_field("text", &Measured::text));
  }
};

double uses_templates(kvferry::TcpTransferChannel& channel);

double uses_templates(kvferry::TcpTransferChannel& channel) {
  const auto message = kvferry::encode_side_message(Measured{});
  channel.async_send_init_side_msg("tcp://127.0.0.1:1", message, {}, asio::use_future).wait();
  return kvferry::decode_side_message<Measured>(message).seconds;
}

}  // namespace strict
