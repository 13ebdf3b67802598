// SPDX-License-Identifier: Apache-2.0
#include <kvferry/side_message_codec.hpp>

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/lmcache_messages.hpp"

namespace kvferry::inline KVFERRY_ABI {
namespace {

using test::from_hex;
using test::to_hex;

struct Layer {
  std::uint16_t index = 0;
  double scale = 0;

  static constexpr std::string_view side_message_type = "Layer";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("index", &Layer::index), side_message_field("scale", &Layer::scale));
  }
  friend bool operator==(const Layer&, const Layer&) = default;
};

struct CacheQuery {
  std::string model;
  Bytes digest;
  std::uint64_t tokens = 0;
  std::int8_t priority = 0;
  bool exact = false;
  float weight = 0;
  std::optional<std::string> tenant;
  std::vector<Layer> layers;
  std::map<std::string, std::uint32_t> counts;
  std::tuple<std::uint64_t, std::string> range;
  std::pair<bool, double> flag;
  std::vector<bool> mask;
  std::array<std::uint8_t, 2> version{};

  static constexpr std::string_view side_message_type = "CacheQuery";
  static constexpr auto side_message_fields() {
    return std::tuple(
        side_message_field("model", &CacheQuery::model), side_message_field("digest", &CacheQuery::digest),
        side_message_field("tokens", &CacheQuery::tokens), side_message_field("priority", &CacheQuery::priority),
        side_message_field("exact", &CacheQuery::exact), side_message_field("weight", &CacheQuery::weight),
        side_message_field("tenant", &CacheQuery::tenant), side_message_field("layers", &CacheQuery::layers),
        side_message_field("counts", &CacheQuery::counts), side_message_field("range", &CacheQuery::range),
        side_message_field("flag", &CacheQuery::flag), side_message_field("mask", &CacheQuery::mask),
        side_message_field("version", &CacheQuery::version));
  }
  friend bool operator==(const CacheQuery&, const CacheQuery&) = default;
};

template <class Value>
struct One {
  Value v{};

  static constexpr std::string_view side_message_type = "One";
  static constexpr auto side_message_fields() { return std::tuple(side_message_field("v", &One::v)); }
};

/// The encoded value of a message's only field: what follows the type and the key.
template <class Value>
std::string hex_of(const Value& value) {
  constexpr std::string_view head = "82a474797065a34f6e65a176";
  const auto hex = to_hex(encode_side_message(One<Value>{value}).encoded());
  EXPECT_TRUE(hex.starts_with(head)) << hex;
  return hex.substr(head.size());
}

/// Decodes a message of One<Value> whose field is this.
template <class Value>
Value decode_hex(const std::string& hex) {
  return decode_side_message<One<Value>>(SideMessage("One", from_hex("82a474797065a34f6e65a176" + hex))).v;
}

/// The complaint of decoding.
template <class Message>
std::string problem_with(const std::string& hex) {
  const SideMessage message(std::string(Message::side_message_type), from_hex(hex));
  std::error_code ec;
  std::ignore = decode_side_message<Message>(message, ec);
  EXPECT_EQ(ec, errc::malformed_message);
  try {
    std::ignore = decode_side_message<Message>(message);
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), errc::malformed_message);
    return error.what();
  }
  return "nothing";
}

template <class Value>
std::string problem_with_value(const std::string& hex) {
  return problem_with<One<Value>>("82a474797065a34f6e65a176" + hex);
}

TEST(HandshakeFaults, Line01_EncodesLmcacheMessagesByteForByte) {
  EXPECT_EQ(to_hex(encode_side_message(P2PInitSideMsg{}).encoded()), test::p2p_init_hex);
  EXPECT_EQ(to_hex(encode_side_message(P2PInitSideRetMsg{std::string(test::peer_lookup_url)}).encoded()),
            test::p2p_init_ret_hex);
  EXPECT_EQ(to_hex(encode_side_message(PySocketInitRequest{std::string(test::peer_init_url)}).encoded()),
            test::py_socket_request_hex);
  EXPECT_EQ(to_hex(encode_side_message(PySocketInitResponse{"ok"}).encoded()), test::py_socket_response_hex);
}

TEST(HandshakeFaults, Line01_DecodesLmcacheMessages) {
  const auto p2p_init = parse_side_message(from_hex(test::p2p_init_hex));
  EXPECT_TRUE(p2p_init.is<P2PInitSideMsg>());
  EXPECT_NO_THROW(std::ignore = decode_side_message<P2PInitSideMsg>(p2p_init));

  const auto p2p_init_ret = parse_side_message(from_hex(test::p2p_init_ret_hex));
  EXPECT_EQ(p2p_init_ret.type(), "P2PInitSideRetMsg");
  EXPECT_EQ(decode_side_message<P2PInitSideRetMsg>(p2p_init_ret).peer_lookup_url, test::peer_lookup_url);

  const auto request = parse_side_message(from_hex(test::py_socket_request_hex));
  EXPECT_EQ(request.type(), "PySocketInitRequest");
  EXPECT_EQ(decode_side_message<PySocketInitRequest>(request).peer_init_url, test::peer_init_url);

  const auto response = parse_side_message(from_hex(test::py_socket_response_hex));
  EXPECT_EQ(response.type(), "PySocketInitResponse");
  EXPECT_EQ(decode_side_message<PySocketInitResponse>(response).status, "ok");
}

TEST(SideMessage, AMessageOfTooManyValuesIsRefusedBeforeAnythingIsBuilt) {
  const auto frame_of = [](std::uint16_t nils) {
    Bytes frame = from_hex("82a474797065a178a179dc");
    frame.push_back(static_cast<std::byte>(nils >> 8));
    frame.push_back(static_cast<std::byte>(nils & 0xFF));
    frame.resize(frame.size() + nils, std::byte{0xC0});
    return frame;
  };
  std::error_code ec;
  EXPECT_EQ(parse_side_message(frame_of(5000), ec).type(), "x");
  EXPECT_FALSE(ec);
  (void)parse_side_message(frame_of(60'000), ec);
  EXPECT_EQ(ec, errc::malformed_message);
}

TEST(HandshakeFaults, Line01_UnknownKeysAreSkippedWhateverTheyHold) {
  // {"later": {1: [nil, 1.5]}, "status": "ok", "blob": bin, "type": "PySocketInitResponse", "ext": timestamp}
  const auto message =
      parse_side_message(from_hex("85a56c61746572810192c0cb3ff8000000000000a6737461747573a26f6ba4626c6f62c401ff"
                                  "a474797065b45079536f636b6574496e6974526573706f6e7365a3657874d6ff00000000"));
  EXPECT_EQ(message.type(), "PySocketInitResponse");
  EXPECT_EQ(decode_side_message<PySocketInitResponse>(message).status, "ok");
}

TEST(SideMessageCodec, UserStructSurvivesARoundTrip) {
  const CacheQuery query{.model = "llama-\xc3\xa9",
                         .digest = {std::byte{0}, std::byte{0xFF}},
                         .tokens = std::numeric_limits<std::uint64_t>::max(),
                         .priority = -128,
                         .exact = true,
                         .weight = 0.1F,
                         .tenant = "a",
                         .layers = {{1, 2.0}, {65535, -0.5}},
                         .counts = {{"x", 1}, {"y", 4'000'000'000}},
                         .range = {7, "seven"},
                         .flag = {true, 1e300},
                         .mask = {true, false, true},
                         .version = {0, 255}};
  const auto message = encode_side_message(query);
  EXPECT_TRUE(message.is<CacheQuery>());
  EXPECT_EQ(parse_side_message(message.encoded()), message);
  EXPECT_EQ(decode_side_message<CacheQuery>(message), query);
  EXPECT_EQ(decode_side_message<CacheQuery>(encode_side_message(CacheQuery{})), CacheQuery{});
}

TEST(SideMessageCodec, ValuesAreEncodedAsByMsgspec) {
  EXPECT_EQ(hex_of(std::uint64_t{0}), "00");
  EXPECT_EQ(hex_of(std::uint64_t{127}), "7f");
  EXPECT_EQ(hex_of(std::uint64_t{128}), "cc80");
  EXPECT_EQ(hex_of(std::uint64_t{256}), "cd0100");
  EXPECT_EQ(hex_of(std::uint64_t{65536}), "ce00010000");
  EXPECT_EQ(hex_of(std::uint64_t{1} << 32U), "cf0000000100000000");
  EXPECT_EQ(hex_of(std::int64_t{5}), "05");
  EXPECT_EQ(hex_of(std::int64_t{-1}), "ff");
  EXPECT_EQ(hex_of(std::int64_t{-33}), "d0df");
  EXPECT_EQ(hex_of(std::int64_t{-129}), "d1ff7f");
  EXPECT_EQ(hex_of(1.0), "cb3ff0000000000000");
  EXPECT_EQ(hex_of(1.5F), "cb3ff8000000000000");
  EXPECT_EQ(hex_of(std::vector<double>{-2.0}), "91cbc000000000000000");
  EXPECT_EQ(hex_of(true), "c3");
  EXPECT_EQ(hex_of(std::string(31, 'a')).substr(0, 4), "bf61");
  EXPECT_EQ(hex_of(std::string(32, 'a')).substr(0, 6), "d92061");
  EXPECT_EQ(hex_of(Bytes{}), "c400");
  EXPECT_EQ(hex_of(std::vector<unsigned char>{7}), "c40107");
  EXPECT_EQ(hex_of(Bytes(256)).substr(0, 8), "c5010000");
  EXPECT_EQ(hex_of(std::optional<int>{}), "c0");
  EXPECT_EQ(hex_of(std::optional<int>{3}), "03");
  EXPECT_EQ(hex_of(std::map<int, std::string>{{1, "a"}}), "8101a161");
  EXPECT_EQ(hex_of(std::tuple<int, bool, std::string>{1, false, ""}), "9301c2a0");
  EXPECT_EQ(hex_of(std::vector<std::pair<int, int>>{{1, 2}}), "91920102");
  EXPECT_EQ(hex_of(Layer{1, 0.5}), "83a474797065a54c61796572a5696e64657801a57363616c65cb3fe0000000000000");
}

TEST(SideMessageCodec, IntegersOfAnyWidthAreTakenIfTheyFit) {
  EXPECT_EQ(decode_hex<std::uint8_t>("cf00000000000000ff"), 255);
  EXPECT_EQ(decode_hex<std::int8_t>("d3ffffffffffffff80"), -128);
  EXPECT_EQ(decode_hex<std::int64_t>("d30000000000000001"), 1);
  EXPECT_EQ(decode_hex<std::int64_t>("cf7fffffffffffffff"), std::numeric_limits<std::int64_t>::max());
  EXPECT_EQ(decode_hex<double>("03"), 3.0);
  EXPECT_EQ(decode_hex<double>("ff"), -1.0);
  EXPECT_EQ(decode_hex<float>("ca3fc00000"), 1.5F);
  EXPECT_TRUE(std::isinf(decode_hex<float>("cb7ff0000000000000")));
  EXPECT_TRUE(std::isnan(decode_hex<float>("cb7ff8000000000000")));
}

TEST(SideMessageCodec, MissingOptionalIsUnset) {
  const SideMessage message("One", from_hex("81a474797065a34f6e65"));
  EXPECT_EQ(decode_side_message<One<std::optional<int>>>(message).v, std::nullopt);
  EXPECT_EQ(decode_hex<std::optional<int>>("c0"), std::nullopt);
}

TEST(SideMessageCodec, SaysWhichFieldIsWrongAndHow) {
  const auto expect = [](const std::string& problem, const std::string& part) {
    EXPECT_NE(problem.find("side message One: field \"v" + part), std::string::npos) << problem;
  };
  expect(problem_with<One<int>>("81a474797065a34f6e65"), "\": missing");
  expect(problem_with<One<int>>("83a474797065a34f6e65a17601a17601"), "\": there twice");
  expect(problem_with<One<std::optional<int>>>("83a474797065a34f6e65a17601a17601"), "\": there twice");
  expect(problem_with_value<std::string>("c40161"), "\": expected str, got bin");
  expect(problem_with_value<Bytes>("a161"), "\": expected bin, got str");
  expect(problem_with_value<Bytes>("9101"), "\": expected bin, got array");
  expect(problem_with_value<int>("c0"), "\": expected int, got nil");
  expect(problem_with_value<int>("cb3ff0000000000000"), "\": expected int, got float");
  expect(problem_with_value<int>("c3"), "\": expected int, got bool");
  expect(problem_with_value<bool>("01"), "\": expected bool, got int");
  expect(problem_with_value<double>("a131"), "\": expected float, got str");
  expect(problem_with_value<std::uint8_t>("cd0100"), "\": expected an int from 0 to 255, got 256");
  expect(problem_with_value<std::uint8_t>("ff"), "\": expected an int from 0 to 255, got -1");
  expect(problem_with_value<std::int8_t>("d1ff7f"), "\": expected an int from -128 to 127, got -129");
  expect(problem_with_value<std::int64_t>("cfffffffffffffffff"), "\": expected an int from -9223372036854775808");
  expect(problem_with_value<float>("cb7fe0000000000000"), "\": expected a float that fits 4 bytes");
  expect(problem_with_value<std::vector<int>>("80"), "\": expected array, got map");
  expect(problem_with_value<std::vector<int>>("9201a0"), "[1]\": expected int, got str");
  expect(problem_with_value<std::map<std::string, int>>("81a161a0"), "[0]\": expected int, got str");
  expect(problem_with_value<std::map<std::string, int>>("90"), "\": expected map, got array");
  expect(problem_with_value<std::pair<int, int>>("9101"), "\": expected an array of 2, got one of 1");
  expect(problem_with_value<std::pair<int, int>>("9201c0"), "[1]\": expected int, got nil");
  expect(problem_with_value<Layer>("82a474797065a54c61796572a5696e64657801"), ".scale\": missing");
  expect(problem_with_value<std::vector<Layer>>("9182a474797065a54c61796572a5696e646578a0"),
         "[0].index\": expected int, got str");
  expect(problem_with_value<Layer>("81a474797065a14c"), ".type\": expected \"Layer\", got \"L\"");
}

TEST(SideMessageCodec, AMessageOfAnotherTypeIsNotDecoded) {
  const auto problem = problem_with<PySocketInitResponse>(std::string(test::p2p_init_hex));
  EXPECT_NE(problem.find("field \"type\": expected \"PySocketInitResponse\", got \"P2PInitSideMsg\""),
            std::string::npos)
      << problem;
}

TEST(SideMessageCodec, DecodingAMessageMadeOfGarbageFails) {
  EXPECT_NE(problem_with<P2PInitSideMsg>("").find("it is cut off"), std::string::npos);
  EXPECT_NE(problem_with<P2PInitSideMsg>("c1").find("it is not msgpack"), std::string::npos);
}

struct Garbage {
  const char* name;
  std::string hex;
  const char* problem;
};

void PrintTo(const Garbage& garbage, std::ostream* stream) { *stream << garbage.name; }

std::string repeat(std::string_view hex, int times) {
  std::string result;
  for (int i = 0; i < times; ++i) {
    result += hex;
  }
  return result;
}

/// {"type": "A", "v": <hex>}
std::string with_value(const std::string& hex) { return "82a474797065a141a176" + hex; }

class MalformedFrame : public ::testing::TestWithParam<Garbage> {};

TEST_P(MalformedFrame, IsRefused) {
  const auto frame = from_hex(GetParam().hex);
  std::error_code ec;
  const auto message = parse_side_message(frame, ec);
  EXPECT_EQ(ec, errc::malformed_message);
  EXPECT_EQ(message, SideMessage());
  try {
    std::ignore = parse_side_message(frame);
    ADD_FAILURE() << "parsed";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), errc::malformed_message);
    EXPECT_NE(std::string(error.what()).find(GetParam().problem), std::string::npos) << error.what();
  }
}

INSTANTIATE_TEST_SUITE_P(
    HandshakeFaults_Line02, MalformedFrame,
    ::testing::Values(Garbage{"Empty", "", "it is cut off"}, Garbage{"ReservedByte", "c1", "it is not msgpack"},
                    Garbage{"Nil", "c0", "it is not a map"}, Garbage{"Integer", "01", "it is not a map"},
                    Garbage{"String", "a161", "it is not a map"}, Garbage{"Array", "91a474797065", "it is not a map"},
                    Garbage{"EmptyMap", "80", "the key \"type\" is missing"},
                    Garbage{"NoType", "81a17601", "the key \"type\" is missing"},
                    Garbage{"NestedTypeOnly", "81a17681a474797065a141", "the key \"type\" is missing"},
                    Garbage{"TypeIsInteger", "81a47479706501", "the value of \"type\" is not a string"},
                    Garbage{"TypeIsBin", "81a474797065c40141", "the value of \"type\" is not a string"},
                    Garbage{"TypeIsArray", "81a47479706591a141", "the value of \"type\" is not a string"},
                    Garbage{"TypeIsEmptyArray", "81a47479706590", "the value of \"type\" is not a string"},
                    Garbage{"TypeIsMap", "81a47479706580", "the value of \"type\" is not a string"},
                    Garbage{"TypeTwice", "82a474797065a141a474797065a142", "is there twice"},
                    Garbage{"IntegerKey", "82a474797065a1410102", "a key is not a string"},
                    Garbage{"BinKey", "81c40474797065a141", "a key is not a string"},
                    Garbage{"MapKey", "828001a474797065a141", "a key is not a string"},
                    Garbage{"TrailingByte", "81a474797065a14100", "something follows the map"},
                    Garbage{"TwoMaps", "81a474797065a14181a474797065a141", "something follows the map"},
                    Garbage{"CutOffInString", "81a474797065ae5032", "it is cut off"},
                    Garbage{"CutOffInMap", "82a474797065a141", "it is cut off"},
                    Garbage{"TypeNotUtf8", "81a474797065a1ff", "a string is not UTF-8"},
                    Garbage{"OverlongUtf8", with_value("a2c080"), "a string is not UTF-8"},
                    Garbage{"OverlongUtf8OfThree", with_value("a3e08080"), "a string is not UTF-8"},
                    Garbage{"SurrogateInUtf8", with_value("a3eda080"), "a string is not UTF-8"},
                    Garbage{"Utf8CutOff", with_value("a2e282"), "a string is not UTF-8"},
                    Garbage{"BehindUnicode", with_value("a4f4908080"), "a string is not UTF-8"},
                    Garbage{"HugeMap", "dfffffffff", "it is cut off"},
                    Garbage{"HugeArray", with_value("ddffffffff"), "it is cut off"},
                    Garbage{"HugeString", with_value("dbffffffff61"), "it is cut off"},
                    Garbage{"HugeBin", with_value("c6ffffffff61"), "it is cut off"},
                    Garbage{"HugeExt", with_value("c9ffffffff0161"), "it is cut off"},
                    Garbage{"ManyHugeArrays", with_value(repeat("dc4000", 20)), "it is cut off"},
                    Garbage{"DeepArrays", with_value(repeat("91", 40) + "01"), "it is nested too deeply"},
                    Garbage{"EndlessDepth", with_value(repeat("91", 100'000)), "it is nested too deeply"},
                    Garbage{"DeepMaps", repeat("81a161", 40) + "01", "it is nested too deeply"}),
    [](const auto& garbage) { return std::string(garbage.param.name); });

TEST(SideMessageCodec, TheDepthThatIsAllowedIsAccepted) {
  const auto depth = static_cast<int>(max_side_message_depth) - 1;
  std::error_code ec;
  EXPECT_EQ(parse_side_message(from_hex(with_value(repeat("91", depth) + "01")), ec).type(), "A");
  EXPECT_FALSE(ec);
  EXPECT_EQ(parse_side_message(from_hex(with_value(repeat("91", depth) + "90")), ec).type(), "");
  EXPECT_EQ(ec, errc::malformed_message);
}

TEST(SideMessageCodec, EmptyContainersKeepTheDepthRight) {
  // {"a": [], "b": {}, "c": [[], {}], "type": "A"}
  const auto message = parse_side_message(from_hex("84a16190a16280a163929080a474797065a141"));
  EXPECT_EQ(message.type(), "A");
}

TEST(SideMessageCodec, StringsOfAllUtf8LengthsAreAccepted) {
  const std::string text = "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xf4\x8f\xbf\xbf\xed\x9f\xbf";
  const auto message = encode_side_message(One<std::string>{text});
  EXPECT_EQ(decode_side_message<One<std::string>>(parse_side_message(message.encoded())).v, text);
}

TEST(SideMessageCodec, ATypeThatIsTheEmptyStringIsAType) {
  std::error_code ec = errc::closed;
  EXPECT_EQ(parse_side_message(from_hex("81a474797065a0"), ec).type(), "");
  EXPECT_FALSE(ec);
}

}  // namespace
}  // namespace kvferry
