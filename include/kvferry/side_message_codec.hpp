// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_SIDE_MESSAGE_CODEC_HPP
#define KVFERRY_SIDE_MESSAGE_CODEC_HPP

// msgpack-cxx has adaptors for Boost's types, for which it needs Boost. Without Boost they are left out.
#if !defined(MSGPACK_NO_BOOST) && !(__has_include(<boost/variant.hpp>) && __has_include(<boost/predef/other/endian.h>))
#define MSGPACK_NO_BOOST
#endif
#include <msgpack.hpp>

#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/config.hpp>
#include <kvferry/side_message.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Side messages with containers that are nested deeper than this are refused.
inline constexpr std::size_t max_side_message_depth = 32;

/// How many values, including keys and containers, a side message of a size may have. The receiver's work grows with
/// their number.
[[nodiscard]] constexpr std::size_t max_side_message_values(std::size_t bytes) noexcept { return 4096 + bytes / 2; }

/// Makes a side message of a received frame. The frame must be a single msgpack map with nothing behind it. Its keys
/// are strings; the key "type" occurs once and holds a string. All strings must be UTF-8. The fields are not decoded.
/// The frame may come from anybody: no memory is allocated for declared values before their bytes are known to be
/// there.
///
/// On anything else `ec` becomes `errc::malformed_message` and the result is empty.
[[nodiscard]] KVFERRY_EXPORT SideMessage parse_side_message(std::span<const std::byte> frame, std::error_code& ec);
/// As above. @throws TransferError `errc::malformed_message`, with a description of the error.
[[nodiscard]] KVFERRY_EXPORT SideMessage parse_side_message(std::span<const std::byte> frame);

namespace detail {

/// As `parse_side_message`; on an error `problem` describes it and the result is empty.
KVFERRY_EXPORT SideMessage parse_frame(std::span<const std::byte> frame, std::string_view& problem);

/// The reason why a message can't be decoded: its place, as "regions[2].size" (empty: the message itself), and its
/// description.
struct DecodeProblem {
  std::string where;
  std::string what;
};

/// Checks a whole message like `parse_side_message` and unpacks the wanted fields; the others are skipped. The result
/// refers to the bytes of `encoded`.
KVFERRY_EXPORT bool unpack_side_message(std::span<const std::byte> encoded,
                                        std::span<const std::string_view> wanted,
                                        msgpack::object_handle& result, DecodeProblem& problem);
/// Whether `from` is of this kind. If not, `problem` describes its kind.
KVFERRY_EXPORT bool expect_kind(const msgpack::object& from, msgpack::type::object_type expected,
                                DecodeProblem& problem);
/// Notes that `from` should have been `expected`. Returns false.
KVFERRY_EXPORT bool unexpected(const msgpack::object& from, std::string_view expected, DecodeProblem& problem);
/// The value of a key; null if it is missing. Null, with a problem noted, if it occurs twice.
KVFERRY_EXPORT const msgpack::object* find_field(const msgpack::object& map, std::string_view name,
                                                 DecodeProblem& problem);
/// Whether the map's key "type" says that this is a message of this type.
KVFERRY_EXPORT bool expect_type(const msgpack::object& map, std::string_view type, DecodeProblem& problem);
[[noreturn]] KVFERRY_EXPORT void throw_malformed(std::string_view type, const DecodeProblem& problem);

/// The buffer that msgpack-cxx writes to.
struct ByteStream {
  Bytes& bytes;

  KVFERRY_EXPORT void write(const char* data, std::size_t size);
};

struct Encoder {
  explicit Encoder(Bytes& bytes) : stream{bytes}, packer(stream) {}

  ByteStream stream;
  msgpack::packer<ByteStream> packer;
};

/// msgspec writes every float as float64; msgpack-cxx would make an integer of a whole number.
KVFERRY_EXPORT void encode_float64(Bytes& bytes, double value);

template <class T, template <class...> class Template>
inline constexpr bool is_specialization = false;
template <template <class...> class Template, class... Args>
inline constexpr bool is_specialization<Template<Args...>, Template> = true;

template <class T>
inline constexpr bool is_std_array = false;
template <class Value, std::size_t Size>
inline constexpr bool is_std_array<std::array<Value, Size>> = true;

template <class T>
concept OptionalValue = is_specialization<T, std::optional>;
template <class T>
concept BinValue = std::same_as<T, std::vector<std::byte>> || std::same_as<T, std::vector<unsigned char>> ||
    std::same_as<T, std::vector<char>>;
template <class T>
concept VectorValue = is_specialization<T, std::vector> && !BinValue<T>;
template <class T>
concept TupleValue = is_specialization<T, std::tuple> || is_specialization<T, std::pair> || is_std_array<T>;

template <class T>
void encode_value(Encoder& encoder, const T& value);

template <SideMessageStruct T>
void encode_struct(Encoder& encoder, const T& message) {
  constexpr auto fields = T::side_message_fields();
  encoder.packer.pack_map(static_cast<std::uint32_t>(1 + std::tuple_size_v<decltype(fields)>));
  encode_value(encoder, std::string_view("type"));
  encode_value(encoder, std::string_view(T::side_message_type));
  std::apply(
      [&](const auto&... field) {
        ((encode_value(encoder, field.name), encode_value(encoder, message.*field.member)), ...);
      },
      fields);
}

template <class T>
void encode_value(Encoder& encoder, const T& value) {
  if constexpr (SideMessageStruct<T>) {
    encode_struct(encoder, value);
  } else if constexpr (std::floating_point<T>) {
    encode_float64(encoder.stream.bytes, static_cast<double>(value));
  } else if constexpr (OptionalValue<T>) {
    if (value.has_value()) {
      encode_value(encoder, *value);
    } else {
      encoder.packer.pack_nil();
    }
  } else if constexpr (VectorValue<T>) {
    encoder.packer.pack_array(msgpack::checked_get_container_size(value.size()));
    for (const auto& element : value) {
      encode_value<typename T::value_type>(encoder, element);
    }
  } else if constexpr (is_specialization<T, std::map>) {
    encoder.packer.pack_map(msgpack::checked_get_container_size(value.size()));
    for (const auto& [key, mapped] : value) {
      encode_value(encoder, key);
      encode_value(encoder, mapped);
    }
  } else if constexpr (TupleValue<T>) {
    encoder.packer.pack_array(static_cast<std::uint32_t>(std::tuple_size_v<T>));
    std::apply([&](const auto&... element) { (encode_value(encoder, element), ...); }, value);
  } else {
    encoder.packer.pack(value);
  }
}

template <class T>
bool decode_value(const msgpack::object& from, T& to, DecodeProblem& problem);

/// Builds the path to the faulty value, from the inside out.
inline bool failed_at(const std::string& step, DecodeProblem& problem) {
  const bool nested_field = !problem.where.empty() && !problem.where.starts_with('[');
  problem.where = step + (nested_field ? "." : "") + problem.where;
  return false;
}

template <class Value>
bool decode_field(const msgpack::object& map, std::string_view name, Value& to, DecodeProblem& problem) {
  const auto* from = find_field(map, name, problem);
  if (from == nullptr && problem.what.empty()) {
    if constexpr (OptionalValue<Value>) {
      to.reset();
      return true;
    } else {
      problem.what = "missing";
    }
  }
  if (from == nullptr || !decode_value(*from, to, problem)) {
    return failed_at(std::string(name), problem);
  }
  return true;
}

template <SideMessageStruct T>
bool decode_struct(const msgpack::object& from, T& to, DecodeProblem& problem) {
  constexpr auto fields = T::side_message_fields();
  return expect_kind(from, msgpack::type::MAP, problem) && expect_type(from, T::side_message_type, problem) &&
         std::apply(
             [&](const auto&... field) { return (decode_field(from, field.name, to.*field.member, problem) && ...); },
             fields);
}

template <std::integral T>
bool decode_integer(const msgpack::object& from, T& to, DecodeProblem& problem) {
  using Limits = std::numeric_limits<T>;
  const bool is_negative = from.type == msgpack::type::NEGATIVE_INTEGER;
  if (!is_negative && from.type != msgpack::type::POSITIVE_INTEGER) {
    return unexpected(from, "int", problem);
  }
  const bool fits = is_negative ? std::signed_integral<T> && from.via.i64 >= static_cast<std::int64_t>((Limits::min)())
                                : from.via.u64 <= static_cast<std::uint64_t>((Limits::max)());
  if (!fits) {
    problem.what = "expected an int from " + std::to_string((Limits::min)()) + " to " +
                   std::to_string((Limits::max)()) + ", got " +
                   (is_negative ? std::to_string(from.via.i64) : std::to_string(from.via.u64));
    return false;
  }
  to = is_negative ? static_cast<T>(from.via.i64) : static_cast<T>(from.via.u64);
  return true;
}

template <std::floating_point T>
bool decode_float(const msgpack::object& from, T& to, DecodeProblem& problem) {
  double value = 0;
  if (from.type == msgpack::type::FLOAT32 || from.type == msgpack::type::FLOAT64) {
    value = from.via.f64;
  } else if (from.type == msgpack::type::POSITIVE_INTEGER) {
    value = static_cast<double>(from.via.u64);
  } else if (from.type == msgpack::type::NEGATIVE_INTEGER) {
    value = static_cast<double>(from.via.i64);
  } else {
    return unexpected(from, "float", problem);
  }
  if (std::isfinite(value) && std::abs(value) > static_cast<double>((std::numeric_limits<T>::max)())) {
    problem.what = "expected a float that fits " + std::to_string(sizeof(T)) + " bytes, got " + std::to_string(value);
    return false;
  }
  to = static_cast<T>(value);
  return true;
}

template <class Vector>
bool decode_vector(const msgpack::object& from, Vector& to, DecodeProblem& problem) {
  if (!expect_kind(from, msgpack::type::ARRAY, problem)) {
    return false;
  }
  to.clear();
  for (std::uint32_t i = 0; i < from.via.array.size; ++i) {
    typename Vector::value_type element{};
    if (!decode_value(from.via.array.ptr[i], element, problem)) {
      return failed_at('[' + std::to_string(i) + ']', problem);
    }
    to.push_back(std::move(element));
  }
  return true;
}

template <class Map>
bool decode_map(const msgpack::object& from, Map& to, DecodeProblem& problem) {
  if (!expect_kind(from, msgpack::type::MAP, problem)) {
    return false;
  }
  to.clear();
  for (std::uint32_t i = 0; i < from.via.map.size; ++i) {
    typename Map::key_type key{};
    typename Map::mapped_type mapped{};
    if (!decode_value(from.via.map.ptr[i].key, key, problem) ||
        !decode_value(from.via.map.ptr[i].val, mapped, problem)) {
      return failed_at('[' + std::to_string(i) + ']', problem);
    }
    to.insert_or_assign(std::move(key), std::move(mapped));
  }
  return true;
}

template <class Tuple>
bool decode_tuple(const msgpack::object& from, Tuple& to, DecodeProblem& problem) {
  constexpr std::size_t size = std::tuple_size_v<Tuple>;
  if (!expect_kind(from, msgpack::type::ARRAY, problem)) {
    return false;
  }
  if (from.via.array.size != size) {
    problem.what =
        "expected an array of " + std::to_string(size) + ", got one of " + std::to_string(from.via.array.size);
    return false;
  }
  std::uint32_t next = 0;
  const auto decode_next = [&](auto& element) {
    const auto i = next++;
    return decode_value(from.via.array.ptr[i], element, problem) || failed_at('[' + std::to_string(i) + ']', problem);
  };
  return std::apply([&](auto&... element) { return (decode_next(element) && ...); }, to);
}

template <class T>
bool decode_value(const msgpack::object& from, T& to, DecodeProblem& problem) {
  if constexpr (SideMessageStruct<T>) {
    return decode_struct(from, to, problem);
  } else if constexpr (std::same_as<T, bool>) {
    if (!expect_kind(from, msgpack::type::BOOLEAN, problem)) {
      return false;
    }
    to = from.via.boolean;
    return true;
  } else if constexpr (std::integral<T>) {
    return decode_integer(from, to, problem);
  } else if constexpr (std::floating_point<T>) {
    return decode_float(from, to, problem);
  } else if constexpr (std::same_as<T, std::string>) {
    if (!expect_kind(from, msgpack::type::STR, problem)) {
      return false;
    }
    to.assign(from.via.str.ptr, from.via.str.size);
    return true;
  } else if constexpr (BinValue<T>) {
    if (!expect_kind(from, msgpack::type::BIN, problem)) {
      return false;
    }
    const auto* data = reinterpret_cast<const typename T::value_type*>(from.via.bin.ptr);
    to.assign(data, data + from.via.bin.size);
    return true;
  } else if constexpr (OptionalValue<T>) {
    if (from.is_nil()) {
      to.reset();
      return true;
    }
    return decode_value(from, to.emplace(), problem);
  } else if constexpr (VectorValue<T>) {
    return decode_vector(from, to, problem);
  } else if constexpr (is_specialization<T, std::map>) {
    return decode_map(from, to, problem);
  } else if constexpr (TupleValue<T>) {
    return decode_tuple(from, to, problem);
  } else {
    try {
      from.convert(to);
      return true;
    } catch (const msgpack::type_error&) {
      return unexpected(from, "another kind", problem);
    }
  }
}

template <SideMessageStruct T>
bool decode_message(const SideMessage& message, T& to, DecodeProblem& problem) {
  constexpr auto wanted = std::apply(
      [](const auto&... field) {
        return std::array{std::string_view("type"), std::string_view(field.name)...};
      },
      T::side_message_fields());
  msgpack::object_handle unpacked;
  return unpack_side_message(message.encoded(), wanted, unpacked, problem) &&
         decode_struct(unpacked.get(), to, problem);
}

}  // namespace detail

/// Encodes a struct as msgspec encodes a tagged struct: a map, first the key "type", then the fields as declared.
/// Integers take as few bytes as they need, floats are float64, an unset `std::optional` is nil. A field may be a
/// `SideMessageStruct` itself, or any type with an adaptor of msgpack-cxx.
template <SideMessageStruct T>
[[nodiscard]] SideMessage encode_side_message(const T& message) {
  Bytes encoded;
  detail::Encoder encoder(encoded);
  detail::encode_struct(encoder, message);
  return SideMessage(std::string(T::side_message_type), std::move(encoded));
}

/// Decodes a message of struct T. Keys may come in any order, and unknown ones are skipped. A message of another type
/// is malformed. So is one with a field that is missing (unless it is a `std::optional`), of another kind, out of its
/// type's range, or there twice. str and bin are distinct kinds.
/// @throws TransferError `errc::malformed_message`, naming the type, the field, and the expected and found values.
template <SideMessageStruct T>
[[nodiscard]] T decode_side_message(const SideMessage& message) {
  T result{};
  detail::DecodeProblem problem;
  if (!detail::decode_message(message, result, problem)) {
    detail::throw_malformed(T::side_message_type, problem);
  }
  return result;
}

/// As above, with the error in `ec`; the result is then a default-constructed T.
template <SideMessageStruct T>
[[nodiscard]] T decode_side_message(const SideMessage& message, std::error_code& ec) {
  T result{};
  detail::DecodeProblem problem;
  if (!detail::decode_message(message, result, problem)) {
    ec = errc::malformed_message;
    return T{};
  }
  ec.clear();
  return result;
}

}  // namespace kvferry

#endif  // KVFERRY_SIDE_MESSAGE_CODEC_HPP
