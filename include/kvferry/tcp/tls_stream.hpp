// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>

#include <kvferry/config.hpp>
#include <kvferry/tcp_certificates.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// The SHA-256 of a certificate as it is sent (DER).
using CertificateHash = std::array<std::byte, 32>;

/// One reading of a side's certificate files: the certificate that it shows, its private key, and the CAs that it trusts. Never
/// changes.
class TlsCertificates {
 public:
  virtual ~TlsCertificates() = default;
  /// The hash of the certificate that is shown.
  [[nodiscard]] virtual const CertificateHash& hash() const noexcept = 0;
  /// The SHA-256 of the bytes of all three files: equal if none of them has changed.
  [[nodiscard]] virtual const CertificateHash& content() const noexcept = 0;
  /// The owner's name, the hash, and the end of its validity.
  [[nodiscard]] virtual const std::string& description() const noexcept = 0;
};

/// The knowledge that both ends of a link's connections share, from the encrypted handshake: TLS's external pre-shared key, or
/// the certificates that each will show.
struct TlsKey {
  std::array<std::byte, 16> identity{};  ///< Names the key on the wire; it reveals nothing else.
  std::array<std::byte, 32> secret{};    ///< Not used with certificates.
  /// This side's, as it has told the peer. Null: the secret is used.
  std::shared_ptr<const TlsCertificates> certificates = nullptr;
  CertificateHash peers_certificate{};  ///< As the peer has told it.

  ~TlsKey() { forget_secret(); }
  /// Overwrites it.
  void forget_secret() noexcept;
};

/// @throws std::system_error if the kernel has no random bytes.
[[nodiscard]] TlsKey random_tls_key();

/// The first message of a dialing side (a ClientHello).
enum class TlsOpening {
  incomplete,
  whole,
  none,  ///< It is something else, or longer than this project's.
};
/// A whole one is at most so long.
inline constexpr std::size_t max_tls_opening = 1024;
/// Looks at a connection's first bytes, before anything is set aside for it. @param length set to how many bytes
/// there have to be, as far as that is known.
[[nodiscard]] TlsOpening look_at_tls_opening(std::span<const std::byte> bytes, std::size_t& length) noexcept;

/// Records that one call takes: as many as a step of a lane's would have if they were of 256 bytes. No kvferry sends so many so
/// small ones. A peer that does keeps others waiting for no longer than one that sends full ones.
inline constexpr std::uint64_t most_records_at_once = 1024;

/// One end of TLS 1.3 on a connected socket that doesn't block. It owns encrypted bytes that the socket hasn't accepted
/// yet, but not the socket. Not thread-safe.
///
/// Functions that return as system calls do set errno: EAGAIN if they would have to wait; EBADMSG if the peer has sent
/// bytes that aren't authentic, or messages that no kvferry sends (a KeyUpdate that asks for another or comes after few
/// records, tickets); EPROTO if the connection ended without close_notify; ENOMEM if memory is used up; EIO if
/// encryption failed; else the socket's errno. After a failure all later calls fail. The calling thread's list of
/// OpenSSL's errors doesn't change.
class TlsStream {
 public:
  virtual ~TlsStream() = default;

  /// Goes on with the handshake. @return would_block (the socket has to become readable first, or writable if something is
  /// held back); `errc::authentication_failed` if the peer doesn't hold the key or the certificate, or speaks something
  /// else; `errc::resource_limit` if memory is used up; an errno.
  [[nodiscard]] virtual std::error_code shake_hands() = 0;
  /// The end of a sentence about the peer that tells what is wrong with a certificate. Empty if something else failed.
  [[nodiscard]] virtual std::string why() const = 0;
  /// The peer is being told what is wrong with its certificate.
  [[nodiscard]] virtual bool refuses_certificate() const noexcept = 0;
  [[nodiscard]] virtual bool shaken() const noexcept = 0;
  /// Of the key that the connection goes by.
  [[nodiscard]] virtual const std::array<std::byte, 16>& identity() const noexcept = 0;
  /// The first bytes that came, up to 8.
  [[nodiscard]] virtual std::span<const std::byte> first_received() const noexcept = 0;

  /// Encrypts all of these bytes, which the CPU reads, and sends as much of it as the socket takes. Only when nothing
  /// is held back. @return their number, or -1.
  [[nodiscard]] virtual ssize_t send(std::span<const iovec> pieces) = 0;
  /// Sends what is held back. @return 0 if that was all, or -1.
  [[nodiscard]] virtual ssize_t flush() noexcept = 0;
  [[nodiscard]] virtual bool holds_back() const noexcept = 0;
  /// Fills `to` as far as bytes have come: fewer are all that there were, unless `has_more`. Stops at many records, which may be
  /// small. @return 0 if the peer has said that it ends.
  [[nodiscard]] virtual ssize_t receive(std::span<std::byte> to) = 0;
  /// `receive` has more bytes, or says why nothing more will come; no event of the socket need tell.
  [[nodiscard]] virtual bool has_more() const noexcept = 0;
  /// That have come until now. Each takes work of its own, however few bytes it brings.
  [[nodiscard]] virtual std::uint64_t records() const noexcept = 0;
  /// Says that nothing more will come.
  virtual void end() noexcept = 0;

  /// "TLS 1.3 AES-128-GCM".
  [[nodiscard]] virtual std::string description() const = 0;
};

/// The TLS state that a channel's connections share. Thread-safe.
class TlsContext {
 public:
  /// The key of this identity, if there is one. Must not throw.
  using FindKey = std::function<std::optional<TlsKey>(std::span<const std::byte> identity)>;

  /// Records that are encrypted with one key, before the sender takes the next: AES-GCM is good for some 2^24.5 full
  /// ones (RFC 8446, 5.5).
  static constexpr std::uint64_t usual_records_per_key = std::uint64_t{1} << 23;

  /// @throws TransferError `errc::not_supported` if kvferry was built without OpenSSL, or it has no TLS 1.3;
  /// `errc::resource_limit` if the program has used up OpenSSL's types of BIOs.
  [[nodiscard]] static std::shared_ptr<TlsContext> create(std::uint64_t records_per_key = usual_records_per_key);
  virtual ~TlsContext() = default;

  /// Reads and checks this side's files. @throws TransferError naming the file and what is wrong with it; std::bad_alloc
  [[nodiscard]] virtual std::shared_ptr<const TlsCertificates> read_certificates(const CertificateFiles& files) = 0;

  /// @throws std::bad_alloc
  [[nodiscard]] virtual std::unique_ptr<TlsStream> dial(int descriptor, const TlsKey& key) = 0;
  /// @param opening what has been received already. @throws std::bad_alloc. A key's certificates are this context's.
  [[nodiscard]] virtual std::unique_ptr<TlsStream> accept(int descriptor, std::span<const std::byte> opening,
                                                          FindKey find) = 0;
};

}  // namespace kvferry::tcp
