// SPDX-License-Identifier: Apache-2.0
// Shared memory, and the TCP that it is made of, compiled by the program, and without OpenSSL: pages move, and a channel that is to
// encrypt them is refused.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <kvferry/keyring.hpp>
#include <kvferry/shared_region.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

#if KVFERRY_WITH_TLS
#error "this program is to be compiled without OpenSSL"
#endif

namespace {

template <class Channel, class Options>
bool moves_a_page() {
  constexpr std::size_t page_size = 4096;
  const kvferry::SharedRegion cache(4 * page_size);
  Options options;
  options.regions = {cache.region(page_size)};
  options.peer_init_url = "tcp://127.0.0.1:0";
  Channel decode(options);
  Channel prefill((Options()));
  prefill.lazy_init_peer_connection("prefill", "decode", decode.peer_init_url());
  const std::vector<std::byte> page(page_size, std::byte{0x2a});
  const std::array<std::uint64_t, 1> index{2};
  prefill.batched_write({kvferry::ConstBuffer(page)}, {.peer_id = "decode", .remote_indexes = index});
  return std::ranges::equal(page, cache.bytes().subspan(2 * page_size, page_size));
}

/// Whether it says that it can't encrypt.
bool is_refused(kvferry::TcpOptions options) {
  const kvferry::KeyPair keys = kvferry::make_key_pair();
  options.keyring = std::make_shared<kvferry::Keyring>(
      keys, std::vector<kvferry::PeerKey>{{std::string(kvferry::PeerKey::any_id), keys.public_key}});
  try {
    const kvferry::TcpTransferChannel channel(std::move(options));
    return false;
  } catch (const kvferry::TransferError& error) {
    std::cout << error.what() << "\n";
    return error.code() == kvferry::errc::not_supported &&
           std::string_view(error.what()).find("encryption and certificates: this kvferry was built without OpenSSL") !=
               std::string_view::npos;
  }
}

}  // namespace

int main() {
  kvferry::TcpOptions required;
  required.encryption = kvferry::Encryption::required;
  kvferry::TcpOptions off;
  off.encryption = kvferry::Encryption::off;
  kvferry::TcpOptions certified;
  certified.certificates = {"chain.pem", "key.pem", "ca.pem"};
  const bool moved = moves_a_page<kvferry::ShmTransferChannel, kvferry::ShmOptions>() &&
                     moves_a_page<kvferry::TcpTransferChannel, kvferry::TcpOptions>();
  std::cout << (moved ? "pages moved\n" : "pages didn't move\n");
  return moved && is_refused({}) && is_refused(required) && is_refused(certified) && !is_refused(off) ? 0 : 1;
}
