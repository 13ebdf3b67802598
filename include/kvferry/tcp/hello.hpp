// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/ip/tcp.hpp>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>

#include <kvferry/side_message.hpp>

#include <kvferry/detail/secret.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Proves that a data connection belongs to a handshake.
using Secret = std::array<std::byte, secret_bytes>;

/// @throws std::system_error if the kernel has no random bytes.
[[nodiscard]] Secret random_secret();

/// The first bytes on a data connection, in either direction: the dialing side's hello, then the accepting side's
/// welcome.
struct Hello {
  static constexpr std::uint64_t dialing = 0x4f4c4c454846564b;    // "KVFHELLO"
  /// Instead of a welcome: too many wait here at the moment, and the same hello may serve in a new connection.
  static constexpr std::uint64_t come_again = 0x4e4941474146564b;  // "KVFAGAIN"
  static constexpr std::uint64_t accepting = 0x4d434c455746564b;  // "KVFWELCM"

  std::uint64_t magic = dialing;
  std::uint32_t version = 3;
  std::uint32_t lane = 0;
  std::uint32_t lane_count = 0;
  std::uint32_t reserved = 0;
  std::uint64_t incarnation = 0;  ///< The sender's.
  Secret secret{};
  std::array<std::byte, 16> reserved2{};
};
static_assert(sizeof(Hello) == 64);

/// The dialing side's endpoint, in the handshake's request.
struct DialEndpoint {
  std::uint64_t lanes = 1;
  std::optional<bool> encrypted = std::nullopt;  ///< Whether its connections are to be; none: they aren't.
  /// SHA-256 of the certificate that the dialing side will show; none: it has none.
  std::optional<Bytes> certificate = std::nullopt;

  static constexpr std::string_view side_message_type = "TcpDial";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("lanes", &DialEndpoint::lanes),
                      side_message_field("encrypted", &DialEndpoint::encrypted),
                      side_message_field("certificate", &DialEndpoint::certificate));
  }
};

/// The accepting side's endpoint, in the handshake's answer.
struct AcceptEndpoint {
  std::string host;  ///< Empty: the host at which the handshake was answered.
  std::uint64_t port = 0;
  std::uint64_t lanes = 1;
  Bytes dial_secret;    ///< The dialing side shows it in its hellos ...
  Bytes accept_secret;  ///< ... and the accepting side this one in its welcomes.
  std::optional<Bytes> tls_identity = std::nullopt;  ///< Which key encrypts the connections (see `TlsKey`), ...
  std::optional<Bytes> tls_secret = std::nullopt;    ///< ... and the key. None of either: they aren't encrypted.
  /// Instead of the key: SHA-256 of the certificate that the accepting side will show.
  std::optional<Bytes> certificate = std::nullopt;

  static constexpr std::string_view side_message_type = "TcpAccept";
  static constexpr auto side_message_fields() {
    return std::tuple(side_message_field("host", &AcceptEndpoint::host),
                      side_message_field("port", &AcceptEndpoint::port),
                      side_message_field("lanes", &AcceptEndpoint::lanes),
                      side_message_field("dial_secret", &AcceptEndpoint::dial_secret),
                      side_message_field("accept_secret", &AcceptEndpoint::accept_secret),
                      side_message_field("tls_identity", &AcceptEndpoint::tls_identity),
                      side_message_field("tls_secret", &AcceptEndpoint::tls_secret),
                      side_message_field("certificate", &AcceptEndpoint::certificate));
  }
};

struct SocketOptions {
  std::size_t send_buffer = 0;
  std::size_t receive_buffer = 0;
  std::chrono::seconds keepalive_idle{0};
  std::chrono::milliseconds user_timeout{0};
  std::string congestion_control;
  std::string same_host_congestion_control;  ///< Where the former is empty.
};

/// @throws TransferError with the errno if this process may not use the congestion control that is asked for.
void check_congestion_control(const std::string& name);

/// Prepares a connected socket for lanes: non-blocking, TCP_NODELAY, congestion control, keepalive, user timeout.
/// Failures of options that only tune are ignored.
void prepare_socket(asio::ip::tcp::socket& socket, const SocketOptions& options, std::error_code& ec);

inline constexpr std::size_t max_lanes = 64;

}  // namespace kvferry::tcp
