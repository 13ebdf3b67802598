// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/ip/address.hpp>

#include <string>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// The hosts at which a peer may accept data connections, from `TcpOptions::allowed_hosts`.
class AllowedHosts {
 public:
  AllowedHosts() = default;
  /// @throws TransferError `errc::invalid_url` for an entry that is no host, address, range of addresses or `*`.
  explicit AllowedHosts(const std::vector<std::string>& entries);

  /// Whether a peer that answered the handshake at the address `reached` may have its data connections at `told`.
  [[nodiscard]] bool allow(const std::string& told, const std::string& reached) const;

 private:
  struct Range {
    asio::ip::address_v6::bytes_type network;  ///< IPv4 as mapped into IPv6.
    unsigned bits = 0;
  };

  void add(const std::string& entry);

  bool all_ = false;
  std::vector<Range> ranges_;
  std::vector<std::string> names_;
};

}  // namespace kvferry::tcp
