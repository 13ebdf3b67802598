// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/testing/conformance_test.hpp>
#include <kvferry/testing/suite_macros.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Send and recv: their matching, the received bytes, and mismatches.
class PairedTests : public ConformanceBase {
 protected:
  static constexpr TransferKind send = TransferKind::send;
  static constexpr TransferKind recv = TransferKind::recv;

  /// A send and its recv, both to be ended with this.
  void expect_both(Transfer& sending, Transfer& receiving, const Outcome& expected) {
    EXPECT_EQ(sending.outcome(), expected) << sending.diagnostic();
    EXPECT_EQ(receiving.outcome(), expected) << receiving.diagnostic();
    EXPECT_TRUE(sending.consistent());
    EXPECT_TRUE(receiving.consistent());
  }

 public:
  void RecvFirst() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects source = a.objects({4096, 1, 100, 8000}).fill(10);
    const Objects target = b.objects({4096, 1, 100, 8000});
    const auto receiving = start(recv, b, a, target, tagged(1));
    const auto sending = start(send, a, b, source, tagged(1));
    expect_both(*sending, *receiving, done(4));
    EXPECT_TRUE(target.match(10));
    EXPECT_TRUE(source.match(10));
    EXPECT_EQ(receiving->sizes(), (std::vector<std::size_t>{4096, 1, 100, 8000}));
  }

  void SendFirst() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects source = a.objects({4096, 1, 100, 8000}).fill(20);
    const Objects target = b.objects({4096, 1, 100, 8000});
    const auto sending = start(send, a, b, source, tagged(1));
    // The connection is in order: when this has been answered, the send has been announced.
    expect_usable(a, b);
    EXPECT_FALSE(sending->ended());
    const auto receiving = start(recv, b, a, target, tagged(1));
    expect_both(*sending, *receiving, done(4));
    EXPECT_TRUE(target.match(20));
  }

  void FromTheAcceptingSide() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair({.listens = false}, {});
    const Objects source = b.objects({300}).fill(30);
    const Objects target = a.objects({300});
    const auto sending = start(send, b, a, source, tagged(1));
    const auto receiving = start(recv, a, b, target, tagged(1));
    expect_both(*sending, *receiving, done(1));
    EXPECT_TRUE(target.match(30));
  }

  void BlockingForms() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects source = a.objects({64, 64}).fill(40);
    const Objects target = b.objects({64, 64});
    const TransferSpec to_b{.peer_id = b.id(), .tag = 3};
    const TransferSpec from_a{.peer_id = a.id(), .tag = 3};
    {
      auto sending = aside([&, &from = a] { return from->batched_send(source.readable(), to_b); });
      EXPECT_EQ(b->batched_recv(target.writable(), from_a), 2U);
      EXPECT_EQ(in_time(sending), 2U);
      EXPECT_TRUE(target.match(40));
    }
    {
      source.fill(50);
      std::error_code send_error = std::make_error_code(std::errc::io_error);
      std::error_code recv_error = send_error;
      auto sending = aside([&, &from = a] { return from->batched_send(source.readable(), to_b, send_error); });
      EXPECT_EQ(b->batched_recv(target.writable(), from_a, recv_error), 2U);
      EXPECT_EQ(in_time(sending), 2U);
      EXPECT_FALSE(send_error) << send_error.message();
      EXPECT_FALSE(recv_error) << recv_error.message();
      EXPECT_TRUE(target.match(50));
    }
  }

  void BlockingFormsThrowWithTheCount() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects source = a.objects({8, 64, 8}).fill(60);
    const Objects target = b.objects({8, 8, 8});
    auto sending = aside([&, &from = a, &to = b]() -> Outcome {
      try {
        return done(from->batched_send(source.readable(), {.peer_id = to.id(), .tag = 1}));
      } catch (const TransferError& error) {
        return {error.code(), error.transferred()};
      }
    });
    try {
      b->batched_recv(target.writable(), {.peer_id = a.id(), .tag = 1});
      ADD_FAILURE() << "did not throw";
    } catch (const TransferError& error) {
      EXPECT_EQ(error.code(), errc::buffer_too_small);
      EXPECT_EQ(error.transferred(), 2U);
      EXPECT_NE(std::string(error.what()).find(a.id()), std::string::npos) << error.what();
    }
    EXPECT_EQ(in_time(sending), failed(errc::buffer_too_small, 2));
  }

  void BuffersLargerThanTheObjects() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects source = a.objects({100, 0, 1}).fill(70);
    const Objects target = b.objects({4096, 16, 2});
    const auto receiving = start(recv, b, a, target);
    const auto sending = start(send, a, b, source);
    expect_both(*sending, *receiving, done(3));
    EXPECT_EQ(receiving->sizes(), (std::vector<std::size_t>{100, 0, 1}));
    EXPECT_TRUE(page_holds(target[0], 100, 70));
    EXPECT_TRUE(page_holds(target[1], 0, 71));
    EXPECT_TRUE(page_holds(target[2], 1, 72));
    EXPECT_TRUE(target.guards_intact());
  }

  void ZeroSizedObjects() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const Objects source = a.objects({0, 0});
    const Objects target = b.objects({0, 5});
    const auto sending = start(send, a, b, source);
    const auto receiving = start(recv, b, a, target);
    expect_both(*sending, *receiving, done(2));
    EXPECT_EQ(receiving->sizes(), (std::vector<std::size_t>{0, 0}));
    EXPECT_TRUE(target.untouched());
  }

  void UnregisteredObjects() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    KVFERRY_TESTING_REQUIRE(unregistered_objects);
    const auto [a, b] = connected_pair();
    std::vector<std::byte> memory(3 * 4096);
    std::vector<std::byte> copy(memory.size());
    fill(memory, 80);
    auto sending = aside([&, &from = a, &to = b] { return from->batched_send({memory}, {.peer_id = to.id()}); });
    EXPECT_EQ(b->batched_recv({MutableBuffer(copy)}, {.peer_id = a.id()}), 1U);
    EXPECT_EQ(in_time(sending), 1U);
    EXPECT_EQ(copy, memory);
  }

  /// The path, without the remarks behind it, of which some come later.
  [[nodiscard]] static std::string connection(const Node& from, const Node& to) {
    const std::string path = from->peer_info(to.id()).value_or(PeerInfo{}).path;
    return path.substr(0, path.find("; "));
  }

  void BufferTooSmall() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const auto path = connection(a, b);
    for (const bool recv_first : {true, false}) {
      SCOPED_TRACE(recv_first);
      const Objects source = a.objects({100, 4097, 1, 50'000, 7}).fill(90);
      const Objects target = b.objects({100, 4096, 1, 0, 7});
      auto receiving = recv_first ? start(recv, b, a, target, tagged(1)) : nullptr;
      const auto sending = start(send, a, b, source, tagged(1));
      if (!recv_first) {
        receiving = start(recv, b, a, target, tagged(1));
      }
      expect_both(*sending, *receiving, failed(errc::buffer_too_small, 3));
      const std::error_code small = errc::buffer_too_small;
      EXPECT_EQ(sending->statuses(), (std::vector<std::error_code>{{}, small, {}, small, {}}));
      EXPECT_EQ(receiving->statuses(), (std::vector<std::error_code>{{}, small, {}, small, {}}));
      for (const std::size_t i : {std::size_t{0}, std::size_t{2}, std::size_t{4}}) {
        EXPECT_TRUE(matches(target[i], 90 + i));
        EXPECT_EQ(receiving->sizes()[i], source[i].size());
      }
      EXPECT_TRUE(is_constant(target[1], background)) << "a part of an object that does not fit";
      EXPECT_TRUE(target.guards_intact());
      EXPECT_NE(receiving->diagnostic().find(a.id()), std::string::npos) << receiving->diagnostic();
      EXPECT_NE(sending->diagnostic().find(b.id()), std::string::npos) << sending->diagnostic();
    }
    expect_usable(a, b);
    EXPECT_EQ(connection(a, b), path) << "the connection was replaced";
  }

  void CountsThatDiffer() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair();
    const auto path = connection(a, b);
    for (const std::size_t received : {std::size_t{2}, std::size_t{4}}) {
      for (const bool recv_first : {true, false}) {
        SCOPED_TRACE(::testing::Message() << received << (recv_first ? ", recv first" : ", send first"));
        const Objects source = a.objects(3, 512).fill(100);
        const Objects target = b.objects(received, 512);
        auto receiving = recv_first ? start(recv, b, a, target, tagged(1)) : nullptr;
        const auto sending = start(send, a, b, source, tagged(1));
        if (!recv_first) {
          receiving = start(recv, b, a, target, tagged(1));
        }
        expect_both(*sending, *receiving, failed(errc::count_mismatch));
        EXPECT_TRUE(target.untouched());
        for (const auto& transfer : {sending, receiving}) {
          EXPECT_NE(transfer->diagnostic().find('3'), std::string::npos) << transfer->diagnostic();
          EXPECT_NE(transfer->diagnostic().find(std::to_string(received)), std::string::npos) << transfer->diagnostic();
        }
      }
    }
    expect_usable(a, b);
    EXPECT_EQ(connection(a, b), path) << "the connection was replaced";
  }

  void MismatchesHarmNothingInFlight() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const auto [a, b] = connected_pair({.local_bytes = 1 << 20}, {.local_bytes = 1 << 20});
    std::vector<std::pair<std::shared_ptr<Transfer>, std::shared_ptr<Transfer>>> good;
    std::vector<std::pair<std::shared_ptr<Transfer>, std::shared_ptr<Transfer>>> bad;
    std::vector<Objects> targets;
    for (std::uint64_t i = 0; i < 30; ++i) {
      const Objects source = a.objects({1000, 3000}).fill(200 + 2 * i);
      targets.push_back(b.objects({1000, 3000}));
      const auto sending = start(send, a, b, source, tagged(i));
      const auto unfit = start(send, a, b, source, tagged(1000 + i));
      const Objects target = i % 2 == 0 ? b.objects({1000}) : b.objects({1000, 2999});
      const auto too_little = start(recv, b, a, target, tagged(1000 + i));
      good.emplace_back(sending, start(recv, b, a, targets.back(), tagged(i)));
      bad.emplace_back(unfit, too_little);
    }
    for (std::size_t i = 0; i < good.size(); ++i) {
      expect_both(*good[i].first, *good[i].second, done(2));
      EXPECT_TRUE(targets[i].match(200 + 2 * i));
      expect_both(*bad[i].first, *bad[i].second,
                  i % 2 == 0 ? failed(errc::count_mismatch) : failed(errc::buffer_too_small, 1));
    }
  }

  void RecvsThatTakeUpTooMuchAtThePeer() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    NodeSpec spec;
    spec.options.max_posted_recv_bytes_of_peer = 4096;
    const auto [a, b] = connected_pair(spec, {});
    constexpr std::uint64_t many = 100;
    std::vector<std::shared_ptr<Transfer>> receiving;
    for (std::uint64_t i = 0; i < many; ++i) {
      receiving.push_back(start(recv, b, a, b.objects({64}), tagged(i)));
    }
    // Too large for what is left of the share, and met by nothing: it ends when all before it have arrived there.
    EXPECT_EQ(start(recv, b, a, b.objects(std::vector<std::size_t>(1000, 0)), tagged(many))->outcome(),
              failed(errc::resource_limit));
    // Completions run in any order: which recvs were refused is known when each has ended, which takes a send to the others.
    std::vector<std::shared_ptr<Transfer>> sending;
    for (std::uint64_t i = 0; i < many; ++i) {
      sending.push_back(start(send, a, b, a.objects({64}), tagged(i)));
    }
    std::size_t refused = 0;
    for (std::uint64_t i = 0; i < many; ++i) {
      if (receiving[i]->outcome() == failed(errc::resource_limit)) {
        EXPECT_FALSE(sending[i]->ended()) << sending[i]->diagnostic();
        ++refused;
      } else {
        expect_both(*sending[i], *receiving[i], done(1));
      }
    }
    EXPECT_GT(refused, 0U);
    EXPECT_LT(refused, many);
    expect_usable(a, b);
  }

  void OneLargeObject() {
    KVFERRY_TESTING_REQUIRE(send_recv);
    const std::size_t size = std::size_t{64} << 20;
    const NodeSpec spec{.regions = {}, .local_bytes = size + 4096};
    const auto [a, b] = connected_pair(spec, spec);
    const Objects source = a.objects({size}).fill(110);
    const Objects target = b.objects({size});
    const auto sending = start(send, a, b, source);
    const auto receiving = start(recv, b, a, target);
    expect_both(*sending, *receiving, done(1));
    EXPECT_TRUE(target.match(110));
  }
};

KVFERRY_TESTING_SUITE(PairedTest, PairedTests, RecvFirst, SendFirst, FromTheAcceptingSide, BlockingForms,
                      BlockingFormsThrowWithTheCount, BuffersLargerThanTheObjects, ZeroSizedObjects,
                      UnregisteredObjects, BufferTooSmall, CountsThatDiffer, MismatchesHarmNothingInFlight,
                      RecvsThatTakeUpTooMuchAtThePeer, OneLargeObject);

}  // namespace kvferry::testing
