// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/tls_stream.hpp>

#include <cstring>

#include <kvferry/error.hpp>

#include <kvferry/tcp/hello.hpp>
#if KVFERRY_WITH_TLS
#include <kvferry/tcp/openssl_certificates-inl.hpp>
#include <kvferry/tcp/openssl_context-inl.hpp>
#include <kvferry/tcp/openssl_stream-inl.hpp>
#endif

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE TlsKey random_tls_key() {
  TlsKey key;
  key.identity = random_secret();
  for (const std::size_t half : {0U, 1U}) {
    make_secret(std::span(key.secret).subspan(half * secret_bytes).first<secret_bytes>());
  }
  return key;
}

KVFERRY_INLINE void TlsKey::forget_secret() noexcept { ::explicit_bzero(secret.data(), secret.size()); }

/// A record of type 22 (RFC 8446, 5.1) with one whole message of type 1 (4.1.2) in it.
KVFERRY_INLINE TlsOpening look_at_tls_opening(std::span<const std::byte> bytes, std::size_t& length) noexcept {
  constexpr std::size_t record_header = 5;
  constexpr std::size_t headers = record_header + 4;
  const auto byte = [bytes](std::size_t i) { return std::to_integer<std::size_t>(bytes[i]); };
  length = headers;
  if ((!bytes.empty() && byte(0) != 22) || (bytes.size() > 1 && byte(1) != 3)) {
    return TlsOpening::none;
  }
  if (bytes.size() < headers) {
    return TlsOpening::incomplete;
  }
  length = record_header + (byte(3) << 8) + byte(4);
  const std::size_t message = (byte(6) << 16) + (byte(7) << 8) + byte(8);
  if (byte(5) != 1 || length > max_tls_opening || headers + message != length) {
    return TlsOpening::none;
  }
  return bytes.size() < length ? TlsOpening::incomplete : TlsOpening::whole;
}

KVFERRY_INLINE std::shared_ptr<TlsContext> TlsContext::create([[maybe_unused]] std::uint64_t records_per_key) {
#if KVFERRY_WITH_TLS
  return std::make_shared<OpenSslContext>(records_per_key);
#else
  throw TransferError(errc::not_supported,
                      "TcpOptions::encryption and certificates: this kvferry was built without OpenSSL");
#endif
}

}  // namespace kvferry::tcp
