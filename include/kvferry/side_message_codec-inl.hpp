// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/side_message_codec.hpp>

#include <algorithm>
#include <bit>
#include <memory>
#include <vector>

#include <kvferry/log.hpp>

#include <kvferry/detail/text.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

inline constexpr std::string_view type_key = "type";

/// Walks through a frame without storing any of it, checks its shape and picks out the type.
class ShapeVisitor : public msgpack::null_visitor {
 public:
  explicit ShapeVisitor(std::size_t frame_size) noexcept : frame_size_(frame_size) {}

  [[nodiscard]] std::string_view problem() const noexcept { return problem_; }
  [[nodiscard]] std::optional<std::string_view> type() const noexcept { return type_; }

  bool visit_nil() { return accept_non_string(); }
  bool visit_boolean(bool) { return accept_non_string(); }
  bool visit_positive_integer(std::uint64_t) { return accept_non_string(); }
  bool visit_negative_integer(std::int64_t) { return accept_non_string(); }
  bool visit_float32(float) { return accept_non_string(); }
  bool visit_float64(double) { return accept_non_string(); }
  bool visit_bin(const char*, std::uint32_t) { return accept_non_string(); }
  bool visit_ext(const char*, std::uint32_t) { return accept_non_string(); }

  bool visit_str(const char* data, std::uint32_t size) {
    const std::string_view text(data, size);
    if (!count_value()) {
      return false;
    }
    if (depth_ == 0) {
      return refuse(not_a_map);
    }
    if (!is_utf8(text)) {
      return refuse("a string is not UTF-8");
    }
    if (depth_ > 1) {
      return true;
    }
    if (in_key_) {
      is_type_value_ = text == type_key;
      return !is_type_value_ || !type_ || refuse("the key \"type\" is there twice");
    }
    if (is_type_value_) {
      type_ = text;
    }
    return true;
  }

  bool start_array(std::uint32_t count) { return accept_non_string() && start_container(count); }
  bool end_array() { return end_container(); }
  bool start_map(std::uint32_t count) { return (depth_ == 0 || accept_non_string()) && start_container(count); }
  bool end_map() { return end_container(); }

  bool start_map_key() { return set_in_key(true); }
  bool end_map_key() { return set_in_key(false); }

  void parse_error(std::size_t, std::size_t) {
    if (problem_.empty()) {
      problem_ = "it is not msgpack";
    }
  }
  void insufficient_bytes(std::size_t, std::size_t) { problem_ = "it is cut off"; }

 private:
  static constexpr std::string_view not_a_map = "it is not a map";

  bool refuse(std::string_view problem) {
    problem_ = problem;
    return false;
  }

  bool count_value() { return ++values_ <= max_side_message_values(frame_size_) || refuse("it has too many values"); }

  bool accept_non_string() {
    if (!count_value()) {
      return false;
    }
    if (depth_ == 0) {
      return refuse(not_a_map);
    }
    if (depth_ == 1 && in_key_) {
      return refuse("a key is not a string");
    }
    return depth_ > 1 || !is_type_value_ || refuse("the value of \"type\" is not a string");
  }

  /// Only the keys of the outermost map matter.
  bool set_in_key(bool in_key) {
    if (depth_ == 1) {
      in_key_ = in_key;
    }
    return true;
  }

  bool start_container(std::uint32_t count) {
    if (depth_ == max_side_message_depth) {
      return refuse("it is nested too deeply");
    }
    if (count > frame_size_) {
      return refuse("it is cut off");
    }
    ++depth_;
    return true;
  }

  bool end_container() {
    --depth_;
    return true;
  }

  std::size_t frame_size_;
  std::size_t values_ = 0;
  std::size_t depth_ = 0;
  bool in_key_ = false;
  bool is_type_value_ = false;
  std::optional<std::string_view> type_;
  std::string_view problem_;
};

/// The frame's type; nothing and a problem if the frame isn't a side message.
KVFERRY_INLINE std::optional<std::string_view> check_shape(std::span<const std::byte> frame,
                                                           std::string_view& problem) {
  const auto* data = reinterpret_cast<const char*>(frame.data());
  ShapeVisitor visitor(frame.size());
  std::size_t consumed = 0;
  if (!msgpack::parse(data, frame.size(), consumed, visitor)) {
    problem = visitor.problem();
  } else if (consumed != frame.size()) {
    problem = "something follows the map";
  } else if (!visitor.type()) {
    problem = "the key \"type\" is missing";
  } else {
    return visitor.type();
  }
  return std::nullopt;
}

KVFERRY_INLINE std::string_view kind_of(const msgpack::object& value) noexcept {
  switch (value.type) {
    case msgpack::type::NIL: return "nil";
    case msgpack::type::BOOLEAN: return "bool";
    case msgpack::type::POSITIVE_INTEGER:
    case msgpack::type::NEGATIVE_INTEGER: return "int";
    case msgpack::type::FLOAT32:
    case msgpack::type::FLOAT64: return "float";
    case msgpack::type::STR: return "str";
    case msgpack::type::BIN: return "bin";
    case msgpack::type::ARRAY: return "array";
    case msgpack::type::MAP: return "map";
    case msgpack::type::EXT: return "ext";
  }
  return "something else";
}

/// @param at where the first key begins, afterwards. @return how many keys there are, of a frame that is a map.
KVFERRY_INLINE std::uint32_t read_map_header(std::span<const std::byte> frame, std::size_t& at) {
  const auto first = std::to_integer<std::uint32_t>(frame[0]);
  const std::size_t bytes = first == 0xDE ? 2 : first == 0xDF ? 4 : 0;
  std::uint32_t count = bytes == 0 ? first & 0x0FU : 0;
  for (std::size_t i = 1; i <= bytes; ++i) {
    count = count << 8U | std::to_integer<std::uint32_t>(frame[i]);
  }
  at = 1 + bytes;
  return count;
}

KVFERRY_INLINE bool is_string(const msgpack::object& value, std::string_view text) noexcept {
  return value.type == msgpack::type::STR && std::string_view(value.via.str.ptr, value.via.str.size) == text;
}

}  // namespace internal

KVFERRY_INLINE SideMessage parse_side_message(std::span<const std::byte> frame, std::error_code& ec) {
  std::string_view problem;
  auto message = detail::parse_frame(frame, problem);
  ec = problem.empty() ? std::error_code() : make_error_code(errc::malformed_message);
  return message;
}

KVFERRY_INLINE SideMessage parse_side_message(std::span<const std::byte> frame) {
  std::string_view problem;
  auto message = detail::parse_frame(frame, problem);
  if (!problem.empty()) {
    throw TransferError(errc::malformed_message, "frame of " + std::to_string(frame.size()) +
                                                     " bytes is no side message: " + std::string(problem));
  }
  return message;
}

namespace detail {

KVFERRY_INLINE SideMessage parse_frame(std::span<const std::byte> frame, std::string_view& problem) {
  const auto type = check_shape(frame, problem);
  return type ? SideMessage(std::string(*type), Bytes(frame.begin(), frame.end())) : SideMessage();
}

KVFERRY_INLINE void ByteStream::write(const char* data, std::size_t size) {
  const auto added = std::as_bytes(std::span(data, size));
  bytes.insert(bytes.end(), added.begin(), added.end());
}

KVFERRY_INLINE void encode_float64(Bytes& bytes, double value) {
  constexpr std::byte float64{0xCB};
  bytes.push_back(float64);
  const auto bits = std::bit_cast<std::uint64_t>(value);
  for (int shift = 56; shift >= 0; shift -= 8) {
    bytes.push_back(static_cast<std::byte>(bits >> shift));
  }
}

KVFERRY_INLINE bool unpack_side_message(std::span<const std::byte> encoded, std::span<const std::string_view> wanted,
                                        msgpack::object_handle& result, DecodeProblem& problem) {
  // Unpacking allocates what a container declares, so it comes after the walk that has seen all the elements.
  std::string_view shape_problem;
  if (!check_shape(encoded, shape_problem)) {
    problem.what = shape_problem;
    return false;
  }
  const auto refer_to_frame = [](msgpack::type::object_type, std::size_t, void*) { return true; };
  const auto* data = reinterpret_cast<const char*>(encoded.data());
  auto zone = std::make_unique<msgpack::zone>();
  std::vector<msgpack::object_kv> fields;
  std::size_t at = 0;
  for (auto left = read_map_header(encoded, at); left > 0; --left) {
    bool refers = false;
    msgpack::object_kv field{};
    field.key = msgpack::unpack(*zone, data, encoded.size(), at, refers, refer_to_frame);
    const bool is_wanted =
        std::ranges::any_of(wanted, [&](std::string_view name) { return is_string(field.key, name); });
    if (is_wanted) {
      field.val = msgpack::unpack(*zone, data, encoded.size(), at, refers, refer_to_frame);
      fields.push_back(field);
    } else {
      msgpack::null_visitor nothing;
      msgpack::parse(data, encoded.size(), at, nothing);
    }
  }
  auto* const stored = static_cast<msgpack::object_kv*>(zone->allocate_align(
      std::max<std::size_t>(fields.size(), 1) * sizeof(msgpack::object_kv), alignof(msgpack::object_kv)));
  std::ranges::copy(fields, stored);
  msgpack::object map;
  map.type = msgpack::type::MAP;
  map.via.map.ptr = stored;
  map.via.map.size = static_cast<std::uint32_t>(fields.size());
  result = msgpack::object_handle(map, std::move(zone));
  return true;
}

KVFERRY_INLINE bool unexpected(const msgpack::object& from, std::string_view expected, DecodeProblem& problem) {
  problem.what = "expected " + std::string(expected) + ", got " + std::string(kind_of(from));
  return false;
}

KVFERRY_INLINE bool expect_kind(const msgpack::object& from, msgpack::type::object_type expected,
                                DecodeProblem& problem) {
  if (from.type == expected) {
    return true;
  }
  msgpack::object example;
  example.type = expected;
  return unexpected(from, kind_of(example), problem);
}

KVFERRY_INLINE const msgpack::object* find_field(const msgpack::object& map, std::string_view name,
                                                 DecodeProblem& problem) {
  const msgpack::object* found = nullptr;
  for (const auto& [key, value] : std::span(map.via.map.ptr, map.via.map.size)) {
    if (!is_string(key, name)) {
      continue;
    }
    if (found != nullptr) {
      problem.what = "there twice";
      return nullptr;
    }
    found = &value;
  }
  return found;
}

KVFERRY_INLINE bool expect_type(const msgpack::object& map, std::string_view type, DecodeProblem& problem) {
  std::string actual;
  if (!decode_field(map, type_key, actual, problem)) {
    return false;
  }
  if (actual != type) {
    problem = {std::string(type_key), "expected \"" + std::string(type) + "\", got \"" + printable(actual) + '"'};
    return false;
  }
  return true;
}

KVFERRY_INLINE void throw_malformed(std::string_view type, const DecodeProblem& problem) {
  auto text = "side message " + std::string(type) + ": ";
  if (!problem.where.empty()) {
    text += "field \"" + problem.where + "\": ";
  }
  throw TransferError(errc::malformed_message, text + problem.what);
}

}  // namespace detail
}  // namespace kvferry
