// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/use_future.hpp>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <future>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include <kvferry/keyring.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

#include "common/patience.hpp"
#include "relay.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {

inline constexpr std::size_t page_size = 4096;
using kvferry_test::long_enough;

/// A channel with one region of memory of its own. Where a test says nothing else, it waits for handshakes and connections as long as
/// a busy machine may take.
struct Node {
  explicit Node(std::size_t pages, TcpOptions options = {}, bool listens = true) : memory(pages * page_size) {
    if (options.hello_timeout == TcpOptions().hello_timeout) {
      options.hello_timeout = long_enough;
    }
    options.regions.push_back({memory.data(), memory.size(), page_size});
    if (listens && options.peer_init_url.empty()) {
      options.peer_init_url = "tcp://127.0.0.1:0";
    }
    channel.emplace(kvferry_test::patient(std::move(options)));
  }

  [[nodiscard]] MutableBuffer page(std::size_t index, std::size_t size = page_size) {
    return {memory.data() + index * page_size, size};
  }
  void fill(unsigned seed) {
    std::mt19937_64 random(seed);
    for (std::size_t i = 0; i + sizeof(std::uint64_t) <= memory.size(); i += sizeof(std::uint64_t)) {
      const std::uint64_t value = random();
      std::memcpy(memory.data() + i, &value, sizeof(value));
    }
  }
  [[nodiscard]] std::vector<MutableBuffer> pages(std::size_t count) {
    std::vector<MutableBuffer> all;
    for (std::size_t i = 0; i < count; ++i) {
      all.push_back(page(i));
    }
    return all;
  }

  std::vector<std::byte> memory;
  std::optional<TcpTransferChannel> channel;
};

/// One key pair for all channels, under any id: their data connections are encrypted.
inline std::shared_ptr<const Keyring> group_keyring() {
  static const auto ring = [] {
    const KeyPair pair = make_key_pair();
    return std::make_shared<const Keyring>(pair, std::vector<PeerKey>{{std::string(PeerKey::any_id), pair.public_key}});
  }();
  return ring;
}

inline std::vector<std::uint64_t> indexes(std::size_t count) {
  std::vector<std::uint64_t> all(count);
  std::iota(all.begin(), all.end(), std::uint64_t{0});
  return all;
}

/// "a" connects to "b"; what "a" and "b" say on the data connection goes through the relay.
struct RelayedPair {
  explicit RelayedPair(std::size_t pages, TcpOptions a_options = {})
      : a_keyring(a_options.keyring), a(pages, std::move(a_options), false) {
    TcpOptions b_options;
    b_options.keyring = a_keyring;
    b_options.advertised_data_address = relay.address();
    b.emplace(pages, std::move(b_options));
    relay.set_target(b->channel->data_port());
    a.channel->lazy_init_peer_connection("a", "b", b->channel->peer_init_url());
  }

  const std::shared_ptr<const Keyring> a_keyring;
  Relay relay;
  Node a;
  std::optional<Node> b;
};

/// A peer that answers handshakes and whose data connections are accepted, but never answered.
struct MutePeer {
  MutePeer() : acceptor(context, {asio::ip::address_v4::loopback(), 0}), node(4, options()) {}

  [[nodiscard]] TcpOptions options() const {
    TcpOptions options;
    options.advertised_data_address = "127.0.0.1:" + std::to_string(acceptor.local_endpoint().port());
    return options;
  }

  asio::io_context context;
  asio::ip::tcp::acceptor acceptor;
  Node node;
};

}  // namespace kvferry::tcp::testing
