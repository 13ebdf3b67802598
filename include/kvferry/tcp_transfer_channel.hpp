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

/// Whether data connections are encrypted. Both sides have to say the same: nothing falls back.
enum class Encryption : std::uint8_t {
  with_keyring,  ///< Encrypted if the channel has a keyring (`ChannelOptions::keyring`).
  off,           ///< Never encrypted. For a network that nobody else is on, or that encrypts.
  required,      ///< Encrypted; the constructor throws if there is no keyring.
};

/// Options of a TCP channel. Sizes are in bytes; 0 leaves a socket option to the system.
struct TcpOptions : ChannelOptions {
  /// Where data connections are accepted: a host or address. Empty: that of `peer_init_url`. Only with a listener.
  std::string data_host;
  /// 0 for any free port.
  std::uint16_t data_port = 0;
  /// The `host:port` that peers are told, where it differs from what was bound. Empty: the bound port, at `data_host`
  /// if that is given and no wildcard, else at the host under which the peer reached `peer_init_url`.
  std::string advertised_data_address;

  /// Where peers' data connections may be besides the address that answered the handshake. A peer's answer names
  /// another one if it has a `data_host` or `advertised_data_address`, and without this a peer could make the channel
  /// connect anywhere. Each entry is an address, a range of addresses ("10.1.0.0/16", "fd00::/8"), a host name, or "*"
  /// for all. Names that are no entry are not looked up. If the handshake was answered by this very host, its other
  /// addresses are allowed as well.
  std::vector<std::string> allowed_hosts;

  /// Encrypts data connections: TLS 1.3, with a key that is agreed in the handshake anew for each link (docs/security.md).
  /// All bytes then pass through the CPU, about as fast as it can do AES-GCM. Between a side that encrypts and one that doesn't,
  /// connecting ends with `errc::encryption_mismatch`.
  Encryption encryption = Encryption::with_keyring;

  /// Both ends of each data connection show a certificate, instead of the key from the handshake, and each accepts the one
  /// that the other has told of in the handshake, if the CA vouches for it. Both sides need certificates, and a keyring:
  /// without it nobody would know who has told what. Files that change are taken up for the next connection; until they are
  /// sound, the last sound ones stay in use (events `certificates_replaced`, `certificates_not_replaced`).
  CertificateFiles certificates;

  /// Data connections to a peer; the smaller number of both sides counts. More than one helps where one TCP stream
  /// can't fill the network (100 Gb/s, long distances).
  std::size_t lanes_per_peer = 1;

  /// One-sided batches of at least this many bytes are spread over the lanes.
  std::size_t stripe_threshold = std::size_t{4} << 20;

  /// How long the peer may take to deal with what was sent of an operation that passed its deadline or was cancelled,
  /// before the connection is given up (and all its operations with it). The operation ends when the peer has dealt with
  /// it; or when the connection is broken, with an error for which `condition::may_still_land` holds.
  std::chrono::milliseconds drain_timeout{100};

  /// How long a data connection may take to prove that it belongs to a peer.
  std::chrono::milliseconds hello_timeout{5'000};

  /// How long a peer that has begun a frame (up to 1 MiB of data, or a recv's list of buffers) may take to send the
  /// rest of it, or another 64 KiB of the rest. After that the connection is given up, and its operations end with
  /// `errc::connection_lost`. From 10 milliseconds to an hour.
  std::chrono::milliseconds frame_timeout{60'000};

  /// SO_SNDBUF and SO_RCVBUF, in bytes. Zero: as the kernel tunes them.
  std::size_t send_buffer = 0;
  std::size_t receive_buffer = 0;

  /// TCP_CONGESTION, of the data connections: "cubic", "bbr", "dctcp", ... as far as the system has and allows it (tcp(7)).
  /// Empty: the system's, or that of the next option. It governs what this side sends. `PeerInfo::path` names it.
  std::string congestion_control;

  /// The same for connections within one host: both ends have one address, or are loopback addresses. Only where
  /// `congestion_control` is empty. Reno is there on each Linux, and most let every process choose it (tcp(7)); where a system
  /// doesn't, its own choice stays. Bbr paces what it sends, which costs throughput where the way is short. Empty: as
  /// everywhere. Another one than reno has to be there.
  std::string same_host_congestion_control = "reno";

  /// An idle connection is probed after this long, so that one that a firewall dropped is noticed before it is used.
  /// Zero: never.
  std::chrono::seconds keepalive_idle{15};

  /// TCP_USER_TIMEOUT: a connection is broken, and what is on it ends with `errc::connection_lost`, when the peer's host
  /// hasn't acknowledged what was sent for so long - probes of an idle connection included - or has had no room for
  /// more. An outage that is shorter is sat out. Up to an hour; zero: the kernel's own patience, about a quarter of an hour
  /// for what was sent, and 15 seconds of probes. Independently of it, an operation that had all of its time, and
  /// at least a second, while nothing came or went, ends the connection when it times out.
  std::chrono::milliseconds user_timeout{30'000};
};

/// Moves pages over TCP: gathered by the kernel straight from the caller's buffers, scattered by it straight into the
/// destination pages, but for the up to 4,544 bytes of a frame that are read together with its header. With encryption the
/// CPU reads and places all of them. See
/// `BaseTransferChannel` for what every channel promises and docs/wire_protocol.md for what travels.
///
/// If a deadline passes before the peer has dealt with all that was sent of a write or send, the operation may end up
/// to `TcpOptions::drain_timeout` later.
///
/// A subclass that overrides `handle_init_side_msg` sets `hold_side_messages` and calls `answer_side_messages()` at the
/// end of its constructor and `close()` in its destructor, so that no message meets a half-made or half-destroyed
/// object.
class KVFERRY_EXPORT TcpTransferChannel : public kit::TransferChannelKit {
 public:
  /// Checks the regions, starts listening (handshakes and data) if there is a `peer_init_url`, and starts the I/O
  /// threads.
  /// @throws TransferError `errc::invalid_region`, `errc::not_supported` (a region of a dma-buf; encryption,
  /// and kvferry was built without OpenSSL), `std::errc::invalid_argument` (`Encryption::required` without a keyring; `require_encryption` without one or with `Encryption::off`;
  /// `certificates` without a keyring, with `Encryption::off`, or that aren't sound: expired, of another key, ...), the errno
  /// of a certificate's file (EACCES also for a key that others may read), `errc::invalid_url` (also for `allowed_hosts`), the errno of a congestion control that can't be
  /// had (ENOENT, EPERM), the errno of a bind that failed, naming the address, or
  /// `errc::timed_out`: the name of a host to listen at was not resolved within `handshake_timeout` (for
  /// `peer_init_url` and `data_host` each).
  explicit TcpTransferChannel(TcpOptions options);
  ~TcpTransferChannel() override;

  [[nodiscard]] std::string_view transport() const noexcept override;
  [[nodiscard]] Capabilities capabilities() const noexcept override;
  [[nodiscard]] ChannelStats stats() const override;

  /// The port at which data connections are accepted, for those who have to open or forward it; 0 without a listener.
  [[nodiscard]] std::uint16_t data_port() const;

 protected:
  [[nodiscard]] std::unique_ptr<kit::Dial> dial(const std::string& peer_id) override;
  [[nodiscard]] Bytes accept(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint,
                             kit::Clock::time_point deadline, kit::LinkHandler on_link) override;
  [[nodiscard]] bool leaves_host_in_the_clear() const noexcept override;
  void stop_listening() override;
  void register_region(const LocalRegion& region) override;

 private:
  class Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace kvferry

#endif  // KVFERRY_TCP_TRANSFER_CHANNEL_HPP
