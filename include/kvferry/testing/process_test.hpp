// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/testing/peer_process.hpp>
#include <kvferry/testing/stalled_peer.hpp>
#include <kvferry/testing/storm.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// For tests with a peer in a process of its own, which executes commands, line by line.
///
/// Commands; the answer is "ok", or an error: start ID URL makes the peer's node; answers its url extra ID URL makes a
///   node with little memory beside it; answers its url connect OWN_ID PEER URL shakes hands fill SEED | check SEED its
///   first pages write|read|send|recv PEER SEED one batch, of the standard objects; read and recv check what arrived
///   storm PEER starts transfers without end; answers "in the middle" when it is there close closes its channel
class ProcessBase : public StalledPeerBase {
 protected:
  static constexpr std::size_t page_size = std::size_t{1} << 20;
  static constexpr std::size_t pages = 32;
  static constexpr std::uint64_t tag = 11;
  static constexpr const char* peer_id = "peer-process";

  /// In the peer's process: executes commands until the input ends. False in the test's own.
  [[nodiscard]] bool serve_if_peer() {
    if (!PeerProcess::is_peer()) {
      return false;
    }
    LineSocket line = PeerProcess::line_to_starter();
    while (const auto command = line.read_line(3 * limit())) {
      std::istringstream words(*command);
      try {
        line.write_line(execute(words));
      } catch (const std::exception& error) {
        line.write_line(error.what());
      }
    }
    return true;
  }

  [[nodiscard]] NodeSpec node_spec() const {
    NodeSpec spec{.regions = {{pages, page_size}}, .local_bytes = 80 * page_size};
    return spec;
  }

  /// Sizes of the objects of a batch: one that takes many packets, and small ones.
  [[nodiscard]] static std::vector<std::size_t> sizes() { return {page_size, 1, 4096, 300'000}; }

  /// Has the process make its node. @return its url; empty if the address is taken.
  [[nodiscard]] std::string start_node(PeerProcess& process, const std::string& url) {
    const std::string answer = process.ask("start " + std::string(peer_id) + " " + url);
    return answer.starts_with("tcp://") ? answer : std::string();
  }

  /// The request of a transfer of the standard objects, which lie in a node's local memory.
  [[nodiscard]] static TransferRequest request(TransferKind kind, const std::string& peer, const Objects& objects,
                                               std::uint64_t first_page, std::uint64_t request_tag) {
    const std::vector<std::uint64_t> indexes = consecutive(first_page, objects.count());
    TransferSpec spec = spec_of(kind, indexes, request_tag);
    spec.peer_id = peer;
    return BaseTransferChannel::make_request(kind, objects.writable(), spec);
  }

  /// Starts transfers of all kinds, two of each, that go on until they fail. Each side sends with the
  /// tag with which the other receives.
  [[nodiscard]] std::shared_ptr<Storm> start_storm(Node& node, const std::string& peer, bool first_side,
                                                   std::vector<Objects>& used) {
    auto storm = std::make_shared<Storm>(node.channel());
    for (const TransferKind kind : kinds()) {
      for (std::uint64_t i = 0; i < 2; ++i) {
        used.push_back(node.objects(sizes()).fill(1));
        // Both sides' transfers run at once: each page is written or read by one of them only.
        const std::uint64_t quarter = (kind == TransferKind::write ? 0U : 2U) + i;
        const std::uint64_t pair_tag = 100 + 2 * i + ((kind == TransferKind::send) == first_side ? 0U : 1U);
        TransferRequest next = request(kind, peer, used.back(), quarter * used.back().count(), pair_tag);
        next.timeout = limit() / 6;
        storm->add(std::move(next));
      }
    }
    return storm;
  }

  /// Has both do one transfer of each kind, started here, and checks them.
  void expect_transfers(Node& node, PeerProcess& process) {
    const std::vector<std::size_t> object_sizes = sizes();
    const Objects source = node.objects(object_sizes).fill(31);
    const Objects target = node.objects(object_sizes);
    const std::string command = " " + node.id() + " ";
    for (const TransferKind kind : kinds()) {
      SCOPED_TRACE(to_string(kind));
      const bool outgoing = kind == TransferKind::send || kind == TransferKind::write;
      const Objects& objects = outgoing ? source : target;
      if (kind == TransferKind::read) {
        EXPECT_EQ(process.ask("fill 31"), "ok");
      } else if (kind == TransferKind::send) {
        process.tell("recv" + command + "31");
      } else if (kind == TransferKind::recv) {
        process.tell("send" + command + "31");
      }
      const auto indexes = consecutive(0, objects.count());
      const auto transfer = start(kind, node, peer_id, objects, spec_of(kind, indexes, tag));
      EXPECT_EQ(transfer->outcome(), done(objects.count())) << transfer->diagnostic();
      EXPECT_TRUE(outgoing || target.match(31));
      EXPECT_EQ(is_one_sided(kind) ? process.ask("check 31") : process.next_line(), "ok");
      for (std::size_t i = 0; i < target.count(); ++i) {
        fill_constant(target[i], background);
      }
    }
  }

  /// Has the peer's process do the one-sided transfers, with this node as their target.
  void expect_transfers_by_peer(Node& node, PeerProcess& process) {
    if (capabilities().write) {
      EXPECT_EQ(process.ask("write " + node.id() + " 51"), "ok");
      EXPECT_TRUE(pages_hold(node, 51));
    }
    if (capabilities().read) {
      fill_pages(node, 61);
      EXPECT_EQ(process.ask("read " + node.id() + " 61"), "ok");
    }
  }

  void fill_pages(Node& node, std::uint64_t seed) {
    for (std::uint64_t page = 0; page < sizes().size(); ++page) {
      fill(node.page(page).first(sizes()[page]), seed + page);
    }
  }

  [[nodiscard]] ::testing::AssertionResult pages_hold(Node& node, std::uint64_t seed) {
    for (std::uint64_t page = 0; page < sizes().size(); ++page) {
      if (auto result = matches(node.page(page).first(sizes()[page]), seed + page); !result) {
        return result << " (page " << page << ")";
      }
    }
    return ::testing::AssertionSuccess();
  }

 private:
  [[nodiscard]] static std::string verdict(const ::testing::AssertionResult& result) {
    return result ? "ok" : result.message();
  }

  [[nodiscard]] std::string execute(std::istringstream& words) {
    std::string command;
    std::string id;
    words >> command;
    if (command == "start") {
      NodeSpec spec = node_spec();
      words >> spec.id >> spec.init_url;
      served_ = &add_node(std::move(spec));
      return served_->url();
    }
    if (command == "extra") {
      NodeSpec spec{.regions = {{1}}, .local_bytes = 4096};
      words >> spec.id >> spec.init_url;
      return add_node(std::move(spec)).url();
    }
    Node& node = *served_;
    if (command == "connect") {
      std::string peer;
      std::string url;
      words >> id >> peer >> url;
      node->lazy_init_peer_connection(id, peer, url);
      return "ok";
    }
    if (command == "storm") {
      words >> id;
      storm_ = start_storm(node, id, false, storm_objects_);
      return storm_->wait_done(10, limit()) ? "in the middle" : "nothing is done";
    }
    if (command == "close") {
      node->close();
      return "ok";
    }
    return execute_on_memory(command, node, words);
  }

  [[nodiscard]] std::string execute_on_memory(const std::string& command, Node& node, std::istringstream& words) {
    std::string peer;
    std::uint64_t seed = 0;
    if (command == "fill" || command == "check") {
      words >> seed;
      if (command == "check") {
        return verdict(pages_hold(node, seed));
      }
      fill_pages(node, seed);
      return "ok";
    }
    words >> peer >> seed;
    const std::map<std::string, TransferKind> named{{"send", TransferKind::send},
                                                    {"recv", TransferKind::recv},
                                                    {"write", TransferKind::write},
                                                    {"read", TransferKind::read}};
    const TransferKind kind = named.at(command);
    Objects objects = node.objects(sizes());
    const bool outgoing = kind == TransferKind::send || kind == TransferKind::write;
    if (outgoing) {
      objects.fill(seed);
    }
    const auto transfer = watch<Transfer>(command, objects.count());
    node->async_transfer(request(kind, peer, objects, 0, tag), transfer->handler());
    if (const Outcome outcome = transfer->outcome(); outcome != done(objects.count())) {
      return outcome.error.message();
    }
    return outgoing ? "ok" : verdict(objects.match(seed));
  }

  Node* served_ = nullptr;
  std::vector<Objects> storm_objects_;
  std::shared_ptr<Storm> storm_;
};

}  // namespace kvferry::testing
