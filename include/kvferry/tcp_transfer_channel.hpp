// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_tcp.hpp>
#ifndef KVFERRY_TCP_TRANSFER_CHANNEL_HPP
#define KVFERRY_TCP_TRANSFER_CHANNEL_HPP

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <kvferry/channel_options.hpp>
#include <kvferry/config.hpp>
#include <kvferry/kit/transfer_channel_kit.hpp>
#include <kvferry/tcp_certificates.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Whether data connections are encrypted. Both sides must encrypt, or neither: nothing falls back.
enum class Encryption : std::uint8_t {
  with_keyring,  ///< Encrypted if the channel has a keyring (`ChannelOptions::keyring`).
  off,           ///< Never encrypted. For a network that nobody else uses, or that encrypts.
  required,      ///< Encrypted; the constructor throws if there is no keyring.
};

/// Options of a TCP channel. Sizes are in bytes; 0 leaves a socket option to the system.
struct TcpOptions : ChannelOptions {
  /// The host or address at which data connections are accepted. Empty: the host of `peer_init_url`. Only with a
  /// listener.
  std::string data_host;
  /// The port at which data connections are accepted; 0 for any free one.
  std::uint16_t data_port = 0;
  /// The `host:port` that peers are told, if it differs from the bound one. Empty: the bound port, at `data_host` if
  /// that is given and no wildcard, else at the host under which the peer reached `peer_init_url`.
  std::string advertised_data_address;

  /// The addresses to which this channel may make data connections, besides the one that answered the handshake. A peer
  /// with a `data_host` or `advertised_data_address` names another one in its answer; without a list of allowed ones, a
  /// peer could make the channel connect anywhere. Each entry is an address, a range of addresses ("10.1.0.0/16",
  /// "fd00::/8"), a host name, or "*" for all. Names that are no entry are not looked up. If this very host answered
  /// the handshake, its other addresses are allowed as well.
  std::vector<std::string> allowed_hosts;

  /// Encrypts data connections: TLS 1.3, with a key that each handshake agrees anew (docs/security.md). All bytes then
  /// pass through the CPU, about as fast as it computes AES-GCM (docs/performance.md has figures). If one side encrypts
  /// and the other doesn't, connecting ends with `errc::encryption_mismatch`.
  Encryption encryption = Encryption::with_keyring;

  /// Certificates that the ends of each data connection show, instead of the key from the handshake. Each end accepts only
  /// the certificate that the other has told in the handshake, if the CA vouches for it. Both sides need certificates, and
  /// a keyring, which proves who has told a certificate. Changed files are used from the next connection on; until they
  /// are valid, the last valid ones stay in use (events `certificates_replaced`, `certificates_not_replaced`).
  CertificateFiles certificates;

  /// The number of data connections to a peer; the smaller one of both sides counts. More than one helps if one TCP
  /// stream can't fill the network (100 Gb/s, long distances).
  std::size_t lanes_per_peer = 1;

  /// One-sided batches of at least this many bytes are spread over the lanes, in whole objects: so a batch of one object,
  /// however large, takes one lane. So does a batch that writes something twice, or reads into buffers that overlap.
  std::size_t stripe_threshold = std::size_t{4} << 20;

  /// For an operation that passed its deadline or was cancelled: how long the peer may take to deal with the bytes that
  /// were sent, before the connection, with all its operations, is given up. The operation ends when the peer has dealt
  /// with the bytes. Or it ends when the connection is broken, with an error of `condition::may_still_land`.
  std::chrono::milliseconds drain_timeout{100};

  /// How long a data connection may take to prove that it belongs to a peer.
  std::chrono::milliseconds hello_timeout{5'000};

  /// How long a peer that has begun a frame (up to 1 MiB of data, or a recv's list of buffers) may take to send the
  /// rest of it, or another 64 KiB of the rest. After that the connection is given up, and its operations end with
  /// `errc::connection_lost`. From 10 milliseconds to an hour.
  std::chrono::milliseconds frame_timeout{60'000};

  /// SO_SNDBUF and SO_RCVBUF, in bytes. Zero: the kernel tunes them.
  std::size_t send_buffer = 0;
  std::size_t receive_buffer = 0;

  /// TCP_CONGESTION of the data connections: "cubic", "bbr", "dctcp", ... if the system has and allows it (tcp(7)).
  /// Empty: the system's, or the next option's. It controls this side's sending. `PeerInfo::path` names it.
  std::string congestion_control;

  /// The same for connections within one host: both ends have one address, or are loopback addresses. Used only if
  /// `congestion_control` is empty. Every Linux has reno, and most let every process choose it (tcp(7)); if a system
  /// doesn't, its own choice stays. (bbr, for comparison, paces its sending, which costs throughput over short
  /// distances.) Empty: as for other connections. If it is another one than reno, the system has to have it.
  std::string same_host_congestion_control = "reno";

  /// How long a connection may be idle before it is probed. The probe detects, before the next use, that a firewall has
  /// dropped the connection. Up to an hour. Zero: never probed.
  std::chrono::seconds keepalive_idle{15};

  /// TCP_USER_TIMEOUT: how long the peer's host may leave sent bytes, or probes of an idle connection, unacknowledged,
  /// or have no room for more. After that the connection is broken, and its operations end with
  /// `errc::connection_lost`. A shorter outage does no harm. Up to an hour. Zero: the kernel's own limits, about a
  /// quarter of an hour for sent bytes, and 15 seconds of probes. Independently of this option, an operation that times
  /// out breaks the connection if nothing came or went during its whole time and that was at least a second.
  std::chrono::milliseconds user_timeout{30'000};
};

/// Moves pages over TCP. The kernel gathers them straight from the caller's buffers, and scatters them straight into
/// the destination pages. Only the up to 4,544 bytes of a frame that are read together with its header are copied once
/// more. With encryption the CPU copies all bytes. `BaseTransferChannel` has the promises of every channel,
/// docs/wire_protocol.md the messages on the wire.
///
/// If a deadline passes before the peer has dealt with all that was sent of a write or send, the operation may end up
/// to `TcpOptions::drain_timeout` later.
///
/// A subclass that overrides `handle_init_side_msg` sets `hold_side_messages`, calls `answer_side_messages()` at the
/// end of its constructor, and calls `close()` in its destructor. So no message reaches a half-made or half-destroyed
/// object.
class KVFERRY_EXPORT TcpTransferChannel : public kit::TransferChannelKit {
 public:
  /// Checks the regions, starts listening (handshakes and data) if there is a `peer_init_url`, and starts the I/O
  /// threads.
  /// @throws TransferError `errc::invalid_region`, `errc::not_supported` (a region of a dma-buf; encryption, if kvferry
  ///   was built without OpenSSL), `std::errc::invalid_argument` (`Encryption::required` without a keyring;
  ///   `require_encryption` without a keyring or with `Encryption::off`; `certificates` without a keyring, with
  ///   `Encryption::off`, or that are invalid: expired, of another key, ...), the errno of a certificate's file (EACCES
  ///   also for a private key that others may read), `errc::invalid_url` (also for `allowed_hosts`), the errno of a
  ///   congestion control that isn't available (ENOENT, EPERM), the errno of a bind that failed, naming the address, or
  ///   `errc::timed_out` if the name of a host to listen at was not resolved within `handshake_timeout` (for
  ///   `peer_init_url` and `data_host` each).
  explicit TcpTransferChannel(TcpOptions options);
  ~TcpTransferChannel() override;

  [[nodiscard]] std::string_view transport() const noexcept override;
  [[nodiscard]] Capabilities capabilities() const noexcept override;
  [[nodiscard]] ChannelStats stats() const override;

  /// The port at which data connections are accepted, for example to open or forward it; 0 without a listener.
  [[nodiscard]] std::uint16_t data_port() const;

 protected:
  [[nodiscard]] std::unique_ptr<kit::Dial> dial(const std::string& peer_id) override;
  [[nodiscard]] Bytes accept(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint,
                             kit::Clock::time_point deadline, kit::LinkHandler on_link) override;
  [[nodiscard]] bool leaves_host_in_the_clear() const noexcept override;
  void stop_listening() override;

 private:
  class Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace kvferry

#endif  // KVFERRY_TCP_TRANSFER_CHANNEL_HPP
