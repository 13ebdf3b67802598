// SPDX-License-Identifier: Apache-2.0
// kvferry's codec beside msgpack-cxx's adaptors for Boost's types.
#include <boost/optional.hpp>

#include <map>
#include <sstream>
#include <string>
#include <vector>

#include <kvferry/side_message_codec.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

#include <msgpack.hpp>

int use_boost_asio();

int main() {
  std::stringstream stream;
  const std::map<std::string, boost::optional<int>> map{{"a", 1}, {"b", boost::none}};
  msgpack::pack(stream, map);
  const std::string packed = stream.str();
  const auto unpacked = msgpack::unpack(packed.data(), packed.size());
  if (unpacked.get().as<std::map<std::string, boost::optional<int>>>() != map) {
    return 1;
  }

  kvferry::TcpOptions options;
  options.peer_init_url = "tcp://127.0.0.1:0";
  options.peer_lookup_url = "lookup";
  kvferry::TcpTransferChannel decode(options);
  kvferry::TcpTransferChannel prefill(kvferry::TcpOptions{});
  const auto question = kvferry::encode_side_message(kvferry::P2PInitSideMsg{});
  const auto answer = prefill.send_init_side_msg(decode.peer_init_url(), question);
  if (kvferry::decode_side_message<kvferry::P2PInitSideRetMsg>(answer).peer_lookup_url != "lookup") {
    return 1;
  }
  return use_boost_asio();
}
