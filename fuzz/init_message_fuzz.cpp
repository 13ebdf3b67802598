// SPDX-License-Identifier: Apache-2.0
// The handshake's question and answer, and the endpoints in them: what can be decoded is the same when it is encoded and decoded again;
// what a peer calls sensible regions is within what this side can count with.
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <kvferry/side_message_codec.hpp>

#include <kvferry/kit/checks.hpp>
#include <kvferry/kit/endpoint_codec.hpp>
#include <kvferry/kit/init_messages.hpp>
#include "fuzz/input.hpp"
#include <kvferry/tcp/hello.hpp>

namespace {

using kvferry::Bytes;
using kvferry::fuzz::Input;
using kvferry::fuzz::require;
using kvferry::kit::InitAnswer;
using kvferry::kit::InitQuestion;

template <class Endpoint>
void decode_endpoint(const Bytes& bytes) {
  std::error_code ec;
  const auto endpoint = kvferry::kit::decode_endpoint<Endpoint>(bytes, ec);
  if (!ec) {
    const auto encoded = kvferry::kit::encode_endpoint(endpoint);
    const auto again = kvferry::kit::decode_endpoint<Endpoint>(encoded, ec);
    require(!ec && kvferry::kit::encode_endpoint(again) == encoded, "an endpoint survives");
  }
}

void check_regions(const std::vector<kvferry::kit::RegionTuple>& regions, std::uint64_t version,
                   const std::string& transport, std::uint64_t incarnation) {
  if (kvferry::kit::check_handshake({"tcp", 1}, "peer", version, transport, incarnation, regions)) {
    return;
  }
  for (const auto& described : kvferry::kit::read_regions(regions)) {
    require(described.page_size != 0 && described.size >= described.page_size &&
                static_cast<unsigned>(described.access) <= 3,
            "a region that is accepted has pages");
  }
}

template <class Message>
bool decode(const kvferry::SideMessage& message, Message& decoded) {
  std::error_code ec;
  decoded = kvferry::decode_side_message<Message>(message, ec);
  if (ec) {
    return false;
  }
  const auto encoded = kvferry::encode_side_message(decoded);
  require(encoded == kvferry::encode_side_message(kvferry::decode_side_message<Message>(encoded)),
          "a message survives");
  decode_endpoint<kvferry::tcp::DialEndpoint>(decoded.endpoint);
  decode_endpoint<kvferry::tcp::AcceptEndpoint>(decoded.endpoint);
  check_regions(decoded.regions, decoded.version, decoded.transport, decoded.incarnation);
  return true;
}

void read(std::span<const std::byte> frame) {
  std::error_code ec;
  const auto message = kvferry::parse_side_message(frame, ec);
  if (ec) {
    return;
  }
  InitQuestion question;
  InitAnswer answer;
  const bool is_question = decode(message, question);
  require(!is_question || message.is<InitQuestion>(), "no other message is taken for a question");
  const bool is_answer = decode(message, answer);
  require(!is_answer || message.is<InitAnswer>(), "no other message is taken for an answer");
  if (is_question) {
    std::string ignored;
    (void)kvferry::kit::check_id(question.sender_id, "the sender");
    (void)kvferry::kit::check_id(question.receiver_id, "the receiver");
  }
}

/// A message that is nearly right, and then has some of its bytes changed.
template <class Message>
Bytes make(Input& input, Message message) {
  message.version = input.choice(8) == 7 ? input.any_number() : message.version;
  message.transport = input.choice(8) == 7 ? "rdma" : "tcp";
  message.incarnation = input.any_number();
  const std::size_t regions = input.choice(6);
  for (std::size_t i = 0; i < regions; ++i) {
    message.regions.emplace_back(input.any_number(), input.any_number(), input.choice(6));
  }
  if (input.flag()) {
    message.endpoint = kvferry::kit::encode_endpoint(kvferry::tcp::DialEndpoint{input.any_number()});
  } else {
    kvferry::tcp::AcceptEndpoint endpoint;
    endpoint.port = input.any_number();
    endpoint.lanes = input.any_number();
    endpoint.dial_secret = Bytes(input.choice(32));
    endpoint.accept_secret = Bytes(16);
    message.endpoint = kvferry::kit::encode_endpoint(endpoint);
  }
  if (input.flag()) {
    message.secret = Bytes(input.choice(32));
  }
  if (input.flag()) {
    message.timeout_ms = input.any_number();
  }
  Bytes bytes = kvferry::encode_side_message(message).encoded();
  while (!input.empty() && input.choice(4) == 0) {
    bytes[input.number<std::uint16_t>() % bytes.size()] = static_cast<std::byte>(input.number());
  }
  return bytes;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  switch (input.choice(3)) {
    case 0: read(input.rest()); break;
    case 1: {
      InitQuestion question;
      question.sender_id = "sender";
      question.receiver_id = std::string(input.choice(256), static_cast<char>(input.number()));
      question.init_url = "tcp://127.0.0.1:1";
      read(make(input, std::move(question)));
      break;
    }
    default: {
      InitAnswer answer;
      answer.status = input.flag() ? InitAnswer::ok : InitAnswer::yield;
      read(make(input, std::move(answer)));
      break;
    }
  }
  return 0;
}
