// SPDX-License-Identifier: Apache-2.0
// The handshake's greeting, question and answer, and the endpoints in them: what can be decoded is the same when it is encoded and
// decoded again; what a peer calls sensible regions is within what this side can count with.
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <kvferry/side_message_codec.hpp>

#include <kvferry/auto/road_offers.hpp>
#include <kvferry/kit/checks.hpp>
#include <kvferry/kit/endpoint_codec.hpp>
#include <kvferry/kit/init_messages.hpp>
#include <kvferry/shm/meeting.hpp>
#include <kvferry/tcp/hello.hpp>
#include "fuzz/input.hpp"

namespace {

using kvferry::Bytes;
using kvferry::fuzz::Input;
using kvferry::fuzz::require;
using kvferry::kit::Greeting;
using kvferry::kit::GreetingAnswer;
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

template <class Message>
void check_regions(const Message& message) {
  namespace kit = kvferry::kit;
  if (kit::check_handshake({"tcp", 1}, "peer", message.version, message.transport, message.incarnation,
                           message.regions) ||
      kit::check_region_numbers("peer", message.regions.size(), message.region_numbers, message.next_region,
                                message.given_regions)) {
    return;
  }
  kit::PeerDescription peer;
  kit::read_regions(message, peer);
  require(peer.regions.size() == message.regions.size() && peer.given_regions <= peer.next_region,
          "regions that are accepted are those that were told");
  std::uint64_t next = 0;
  for (const auto& described : peer.regions) {
    require(described.page_size != 0 && described.size >= described.page_size &&
                static_cast<unsigned>(described.access) <= 3,
            "a region that is accepted has pages");
    require(described.number >= next, "regions that are accepted have ascending numbers");
    next = std::uint64_t{described.number} + 1;
  }
  require(next <= peer.next_region, "the next region that is accepted is behind all others");
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
  if constexpr (requires { decoded.endpoint; }) {
    decode_endpoint<kvferry::tcp::DialEndpoint>(decoded.endpoint);
    decode_endpoint<kvferry::tcp::AcceptEndpoint>(decoded.endpoint);
    decode_endpoint<kvferry::shm::AcceptEndpoint>(decoded.endpoint);
    decode_endpoint<kvferry::roads::RoadOffers>(decoded.endpoint);
    check_regions(decoded);
  }
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
  Greeting greeting;
  require(!decode(message, greeting) || message.is<Greeting>(), "no other message is taken for a greeting");
  GreetingAnswer greeting_answer;
  require(!decode(message, greeting_answer) || message.is<GreetingAnswer>(),
          "no other message is taken for a greeting's answer");
  if (is_question) {
    std::string ignored;
    (void)kvferry::kit::check_id(question.sender_id, "the sender");
    (void)kvferry::kit::check_id(question.receiver_id, "the receiver");
  }
}

template <class T>
T any(Input& input);
template <class Message>
void vary(Input& input, Message& message);

template <class T>
struct Any {
  static T of(Input& input) { return static_cast<T>(input.any_number()); }
};
template <>
struct Any<bool> {
  static bool of(Input& input) { return input.flag(); }
};
template <>
struct Any<std::byte> {
  static std::byte of(Input& input) { return static_cast<std::byte>(input.number()); }
};
template <>
struct Any<std::string> {
  static std::string of(Input& input) {
    static constexpr std::array usual{"tcp", "rdma", "ok", "yield", "here", "tcp://127.0.0.1:1", "127.0.0.1"};
    const std::size_t choice = input.choice(2 * usual.size());
    return choice < usual.size() ? usual[choice] : std::string(input.choice(256), static_cast<char>(input.number()));
  }
};
template <class T>
struct Any<std::optional<T>> {
  static std::optional<T> of(Input& input) { return input.flag() ? std::optional(any<T>(input)) : std::nullopt; }
};
template <class T>
struct Any<std::vector<T>> {
  static std::vector<T> of(Input& input) {
    std::vector<T> made(input.choice(std::is_same_v<T, std::byte> ? 32 : 6));
    for (T& element : made) {
      element = any<T>(input);
    }
    return made;
  }
};
template <class... T>
struct Any<std::tuple<T...>> {
  static std::tuple<T...> of(Input& input) { return {any<T>(input)...}; }
};
template <kvferry::SideMessageStruct T>
struct Any<T> {
  static T of(Input& input) {
    T made;
    vary(input, made);
    return made;
  }
};

template <class T>
T any(Input& input) {
  return Any<T>::of(input);
}

/// Each field that travels may become anything, so none can be forgotten.
template <class Message>
void vary(Input& input, Message& message) {
  const auto vary_one = [&](const auto& field) {
    if (input.choice(4) == 3) {
      message.*field.member = any<std::remove_cvref_t<decltype(message.*field.member)>>(input);
    }
  };
  std::apply([&](const auto&... fields) { (vary_one(fields), ...); }, Message::side_message_fields());
}

Bytes endpoint_of(Input& input) {
  switch (input.choice(8)) {
    case 0: return kvferry::kit::encode_endpoint(any<kvferry::tcp::AcceptEndpoint>(input));
    case 1: return kvferry::kit::encode_endpoint(any<kvferry::shm::AcceptEndpoint>(input));
    case 2: return kvferry::kit::encode_endpoint(any<kvferry::roads::RoadOffers>(input));
    default: return kvferry::kit::encode_endpoint(any<kvferry::tcp::DialEndpoint>(input));
  }
}

/// Regions whose numbers are right as a rule.
template <class Message>
void number(Input& input, Message& message) {
  message.region_numbers.emplace();
  std::uint64_t next = 0;
  for (std::size_t i = 0; i < message.regions.size(); ++i) {
    next += input.number();
    message.region_numbers->push_back(next++);
  }
  message.next_region = next + input.choice(4);
  message.given_regions = input.choice(4);
}

template <class Message>
void describe(Input& input, Message& message) {
  message.transport = "tcp";
  message.incarnation = 7;
  message.endpoint = endpoint_of(input);
  const std::size_t regions = input.choice(6);
  for (std::size_t i = 0; i < regions; ++i) {
    const std::uint64_t page = 1 + input.number();
    message.regions.emplace_back(page * (1 + input.choice(16)), page, input.choice(5));
  }
  if (input.flag()) {
    number(input, message);
  }
}

/// A message that is right before some of its fields are something else, and some of its bytes changed.
template <class Message>
Bytes make(Input& input, Message message) {
  vary(input, message);
  Bytes bytes = kvferry::encode_side_message(message).encoded();
  while (!input.empty() && input.choice(4) == 0) {
    bytes[input.number<std::uint16_t>() % bytes.size()] = static_cast<std::byte>(input.number());
  }
  return bytes;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  switch (input.choice(5)) {
    case 0: read(input.rest()); break;
    case 1: {
      InitQuestion question;
      question.sender_id = "sender";
      question.receiver_id = "receiver";
      question.init_url = "tcp://127.0.0.1:1";
      describe(input, question);
      read(make(input, std::move(question)));
      break;
    }
    case 2: {
      InitAnswer answer;
      answer.status = InitAnswer::ok;
      describe(input, answer);
      read(make(input, std::move(answer)));
      break;
    }
    case 3: read(make(input, Greeting{"tcp://127.0.0.1:1", kvferry::kit::protocol_version})); break;
    default: read(make(input, GreetingAnswer{"ok", kvferry::kit::protocol_version})); break;
  }
  return 0;
}
