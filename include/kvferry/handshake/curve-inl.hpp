// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/handshake/curve.hpp>

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include <kvferry/completion.hpp>
#include <kvferry/detail/descriptor.hpp>
#include <kvferry/detail/secret_file.hpp>
#include <kvferry/detail/text.hpp>
#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

KVFERRY_INLINE void require_curve() {
  if (zmq_has("curve") == 0) {
    throw TransferError(errc::not_supported, "this ZeroMQ was built without CURVE: there are no keys");
  }
}

KVFERRY_INLINE std::string_view first_line(std::string_view text) { return text.substr(0, text.find_first_of("\r\n")); }

/// Reads a key out of memory, which is overwritten. @param where it was, for an error.
KVFERRY_INLINE SecretKey take_key(std::span<char> memory, std::string_view key, const std::string& where) {
  SecretKey taken;
  std::error_code problem;
  try {
    taken = SecretKey(key);
  } catch (const TransferError& error) {
    problem = error.code();
  }
  ::explicit_bzero(memory.data(), memory.size());
  if (problem) {
    throw TransferError(problem,
                        where + " is no key: a key is " + std::to_string(key_characters) + " characters of Z85");
  }
  return taken;
}

}  // namespace internal

KVFERRY_INLINE KeyPair make_key_pair() {
  require_curve();
  std::array<char, key_characters + 1> public_key{};
  std::array<char, key_characters + 1> secret_key{};
  if (zmq_curve_keypair(public_key.data(), secret_key.data()) != 0) {
    throw TransferError(std::error_code(zmq_errno(), std::system_category()), "making a key pair");
  }
  KeyPair made{public_key.data(), SecretKey(secret_key.data())};
  ::explicit_bzero(secret_key.data(), secret_key.size());
  return made;
}

KVFERRY_INLINE KeyPair key_pair_of(const SecretKey& secret_key) {
  require_curve();
  std::array<char, key_characters + 1> public_key{};
  if (zmq_curve_public(public_key.data(), secret_key.text()) != 0) {
    throw TransferError(std::error_code(zmq_errno(), std::system_category()), "the public key of a secret one");
  }
  return {public_key.data(), secret_key};
}

KVFERRY_INLINE KeyPair read_key_pair(const std::string& path) {
  const auto refuse = [&] { throw TransferError(std::error_code(errno, std::system_category()), "key file " + path); };
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat status {};
  if (!file || ::fstat(file.get(), &status) != 0) {
    refuse();
  }
  require_owner_only(status, "key file " + path);
  // A pipe, as of "<(vault read ...)", may give it in parts.
  std::array<char, 256> text{};
  std::string_view all;
  while (all.size() < text.size() && all.find('\n') == std::string_view::npos) {
    const ssize_t size = ::read(file.get(), text.data() + all.size(), text.size() - all.size());
    if (size == 0) {
      break;
    }
    if (size < 0 && errno != EINTR) {
      const int error = errno;
      ::explicit_bzero(text.data(), text.size());
      errno = error;
      refuse();
    }
    all = {text.data(), all.size() + (size < 0 ? 0 : static_cast<std::size_t>(size))};
  }
  if (all.starts_with(byte_order_mark)) {
    all.remove_prefix(byte_order_mark.size());
  }
  return key_pair_of(take_key(text, first_line(all), "the first line of " + path));
}

KVFERRY_INLINE KeyPair take_key_pair_from_environment(const char* variable) {
  char* const value = std::getenv(variable);  // NOLINT(concurrency-mt-unsafe): the caller's, who is told so
  const std::string name = std::string("environment variable ") + variable;
  if (value == nullptr) {
    throw TransferError(std::make_error_code(std::errc::invalid_argument), name + " is not set");
  }
  const std::span<char> text(value, std::strlen(value));
  // Secrets of Kubernetes' that were made of a file end as the file does.
  KeyPair pair = key_pair_of(take_key(text, first_line({text.data(), text.size()}), name));
  ::unsetenv(variable);  // NOLINT(concurrency-mt-unsafe): as above
  return pair;
}

}  // namespace kvferry

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

inline constexpr std::string_view zap_endpoint = "inproc://zeromq.zap.01";
inline constexpr std::string_view zap_version = "1.0";
inline constexpr std::size_t binary_key_bytes = 32;

KVFERRY_INLINE Bytes bytes_of_text(std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

/// In Z85; empty if it is none.
KVFERRY_INLINE std::string key_in(const zmq::message_t& frame) {
  std::array<char, key_characters + 1> text{};
  if (frame.size() != binary_key_bytes ||
      zmq_z85_encode(text.data(), frame.data<std::uint8_t>(), frame.size()) == nullptr) {
    return {};
  }
  return text.data();
}

}  // namespace internal

KVFERRY_INLINE void secure_server(zmq::socket_ref socket, const Keyring& keyring) {
  const KeyPair own = keyring.own();
  socket.set(zmq::sockopt::curve_server, true);
  socket.set(zmq::sockopt::curve_secretkey, own.secret_key.text());
  // Where ZeroMQ has nobody to ask it lets everybody in; the listener answers nobody who comes without a key.
  socket.set(zmq::sockopt::zap_domain, "kvferry");
}

KVFERRY_INLINE void secure_client(zmq::socket_ref socket, const Keyring& keyring, const std::string& server_key) {
  const KeyPair own = keyring.own();
  socket.set(zmq::sockopt::curve_publickey, own.public_key);
  socket.set(zmq::sockopt::curve_secretkey, own.secret_key.text());
  socket.set(zmq::sockopt::curve_serverkey, server_key);
}

KVFERRY_INLINE KeyCheck::KeyCheck(const SharedContext& context, std::shared_ptr<const Keyring> keyring,
                                  std::shared_ptr<Refusals> refusals)
    : socket_(context, zmq::socket_type::router, 4096), keyring_(std::move(keyring)), refusals_(std::move(refusals)) {
  ref().bind(std::string(zap_endpoint));
}

KVFERRY_INLINE void KeyCheck::serve() {
  try {
    while (serve_one()) {
    }
  } catch (...) {
    kvferry::detail::log_exception("where a key was checked");  // who has it isn't let in
  }
}

KVFERRY_INLINE std::string KeyCheck::key_of(const zmq::message_t& frame) {
  const char* const key = zmq_msg_gets(const_cast<zmq::message_t&>(frame).handle(), key_property);
  return key == nullptr ? std::string() : std::string(key);
}

KVFERRY_INLINE bool KeyCheck::serve_one() {
  const auto frames = socket_.receive();
  if (frames.empty()) {
    return false;
  }
  // The frames: the asker's identity, an empty one, version, request, domain, address, identity, mechanism, credentials.
  constexpr std::size_t version = 2;
  constexpr std::size_t mechanism = 7;
  const bool whole = frames.size() == mechanism + 2 && frames[version].to_string_view() == zap_version;
  const std::string key =
      whole && frames[mechanism].to_string_view() == "CURVE" ? key_in(frames[mechanism + 1]) : std::string();
  const bool known = !key.empty() && keyring_->knows(key);
  if (!known && refusals_) {
    refusals_->count(errc::authentication_failed, {}, "the keyring has no peer with the key " + key);
  }
  const auto frame = [&](std::size_t number) {
    return bytes_of_text(frames.size() > number ? frames[number].to_string_view() : std::string_view());
  };
  const std::array envelope{frame(0), Bytes(), bytes_of_text(zap_version), frame(version + 1),
                            bytes_of_text(known ? "200" : "400"), bytes_of_text(known ? "OK" : "unknown key"),
                            bytes_of_text(known ? key : std::string())};
  return socket_.send(envelope, {});
}

}  // namespace kvferry::kit
