// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <future>
#include <list>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <kvferry/base_transfer_channel.hpp>
#include <kvferry/testing/conformance_registry.hpp>
#include <kvferry/testing/node.hpp>
#include <kvferry/testing/patterns.hpp>
#include <kvferry/testing/probe.hpp>
#include <kvferry/testing/specs.hpp>
#include <kvferry/testing/traits.hpp>
#include <kvferry/testing/test_watchdog.hpp>
#include <kvferry/testing/watchdog.hpp>

/// Skips the test, visibly, where the transport says that it cannot do this. `run_main` counts these.
#define KVFERRY_TESTING_REQUIRE(capability)                         \
  ::testing::Test::RecordProperty("kvferry_requires", #capability); \
  if (!this->capabilities().capability)                             \
  GTEST_SKIP() << "Capabilities::" #capability " of this transport is " << this->capabilities().capability

namespace kvferry::inline KVFERRY_ABI::testing {

/// The base of the suite's tests: nodes, and operations that are watched until the test's end, when all
/// channels are gone and every handler must have run exactly once.
class ConformanceBase : public ::testing::Test {
 protected:
  using Milliseconds = std::chrono::milliseconds;

  [[nodiscard]] Capabilities capabilities() { return transport_->capabilities(); }
  [[nodiscard]] std::unique_ptr<BaseTransferChannel> make_channel(ChannelOptions options) {
    return transport_->make_channel(std::move(options));
  }

  /// Before the test runs.
  void put_to_the_test(std::unique_ptr<TransportUnderTest> transport) {
    transport_ = std::move(transport);
    facts_ = transport_->facts();
    facts_.wait_limit = scaled(facts_.wait_limit);
  }

  void SetUp() override {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    watchdog_.emplace(std::string(info->test_suite_name()) + "." + info->name(), 3 * facts_.wait_limit);
  }

  void TearDown() override {
    drop_nodes();
    transport_.reset();
    for (const auto& probe : probes_) {
      probe->verify();
    }
  }

  [[nodiscard]] const TraitsFacts& facts() const { return facts_; }
  [[nodiscard]] Milliseconds limit() const { return facts_.wait_limit; }

  /// @name Nodes
  /// @{
  Node& add_node(NodeSpec spec = {}) {
    if (spec.id.empty()) {
      // A port that a closed node had may soon be of a test in another process, which must not look like that node.
      spec.id = "node-" + std::to_string(::getpid()) + "-" + std::to_string(++last_node_number_);
    }
    const std::string url = spec.init_url.empty() ? facts_.listen_url : spec.init_url;
    const auto answer = spec.answer;
    return nodes_.emplace_back(
        std::move(spec), url,
        [&](ChannelOptions options) {
          options.hold_side_messages = answer != nullptr;
          return answer ? transport_->make_answering_channel(std::move(options), answer)
                        : make_channel(std::move(options));
        },
        [this](std::size_t size) { return transport_->allocate(size); });
  }

  /// Has `from` connect to `to`. Throws, and so fails the test, if that fails.
  void connect(Node& from, Node& to) {
    std::string diagnostic;
    const auto error = start_connect(from, to, &diagnostic)->error();
    if (error) {
      throw std::runtime_error(from.id() + " could not connect to " + to.id() + ": " + error.message() + " " +
                               diagnostic);
    }
  }

  std::shared_ptr<SideMessageProbe> start_connect(Node& from, const Node& to, std::string* diagnostic = nullptr,
                                                  std::optional<Milliseconds> timeout = {}) {
    return start_connect(from, from.id(), to.id(), to.url(), {}, {timeout, diagnostic});
  }

  std::shared_ptr<SideMessageProbe> start_connect(Node& from, std::string_view local_id, std::string_view peer_id,
                                                  std::string_view url, std::optional<SideMessage> message = {},
                                                  const InitSpec& spec = {}) {
    auto probe = watch<SideMessageProbe>("lazy_init_peer_connection to " + std::string(url));
    const InitiationScope initiating;
    from->async_lazy_init_peer_connection(local_id, peer_id, url, std::move(message), spec, probe->handler());
    return probe;
  }

  std::shared_ptr<SideMessageProbe> start_side_message(Node& from, std::string_view url, SideMessage message,
                                                       const InitSpec& spec = {}) {
    auto probe = watch<SideMessageProbe>("send_init_side_msg to " + std::string(url));
    const InitiationScope initiating;
    from->async_send_init_side_msg(url, std::move(message), spec, probe->handler());
    return probe;
  }

  /// Destroys all nodes, the last first.
  void drop_nodes() {
    while (!nodes_.empty()) {
      nodes_.pop_back();
    }
  }

  struct Pair {
    Node& a;
    Node& b;
  };

  [[nodiscard]] Pair pair(NodeSpec a = {}, NodeSpec b = {}) {
    Node& first = add_node(std::move(a));
    return {first, add_node(std::move(b))};
  }

  /// Two nodes of which the first has connected to the second.
  [[nodiscard]] Pair connected_pair(NodeSpec a = {}, NodeSpec b = {}) {
    const Pair nodes = pair(std::move(a), std::move(b));
    connect(nodes.a, nodes.b);
    return nodes;
  }
  /// @}

  /// @name Operations
  /// @{

  /// Starts a transfer whose handler `adapt` may wrap (bind to an executor, to a cancellation slot, ...).
  template <class Adapt>
  std::shared_ptr<Transfer> start_adapted(TransferKind kind, Node& from, std::string_view peer, const Objects& objects,
                                          TransferSpec spec, Adapt adapt) {
    auto transfer = watch<Transfer>(from.id() + "'s " + std::string(to_string(kind)) + " with " + std::string(peer),
                                    objects.count());
    spec.peer_id = peer;
    if (spec.statuses.data() == nullptr) {
      spec.statuses = transfer->statuses();
    }
    if (kind == TransferKind::recv && spec.sizes.data() == nullptr) {
      spec.sizes = transfer->sizes();
    }
    spec.diagnostic = &transfer->diagnostic();
    auto handler = adapt(transfer->handler());
    const InitiationScope initiating;
    switch (kind) {
      case TransferKind::send: from->async_batched_send(objects.readable(), spec, std::move(handler)); break;
      case TransferKind::recv: from->async_batched_recv(objects.writable(), spec, std::move(handler)); break;
      case TransferKind::write: from->async_batched_write(objects.readable(), spec, std::move(handler)); break;
      case TransferKind::read: from->async_batched_read(objects.writable(), spec, std::move(handler)); break;
    }
    return transfer;
  }

  std::shared_ptr<Transfer> start(TransferKind kind, Node& from, std::string_view peer, const Objects& objects,
                                  const TransferSpec& spec = {}) {
    return start_adapted(kind, from, peer, objects, spec, [](auto handler) { return handler; });
  }
  std::shared_ptr<Transfer> start(TransferKind kind, Node& from, const Node& to, const Objects& objects,
                                  const TransferSpec& spec = {}) {
    return start(kind, from, to.id(), objects, spec);
  }

  std::shared_ptr<NotificationProbe> start_receive_notification(Node& node, std::optional<Milliseconds> timeout = {}) {
    auto probe = watch<NotificationProbe>(node.id() + "'s receive_notification");
    const InitiationScope initiating;
    node->async_receive_notification(timeout, probe->handler());
    return probe;
  }

  /// Starts an operation of this kind: a write to the peer's first pages, a read of those behind, a send or recv of tag
  /// 0.
  std::shared_ptr<Transfer> start_any(TransferKind kind, Node& from, const Node& to, const Objects& objects,
                                      std::optional<Milliseconds> timeout = {}) {
    const std::vector<std::uint64_t> indexes =
        consecutive(kind == TransferKind::read ? objects.count() : 0, objects.count());
    TransferSpec spec = spec_of(kind, indexes);
    spec.timeout = timeout;
    return start(kind, from, to, objects, spec);
  }

  /// Makes a probe that is verified at the end of the test. May be called from any thread.
  template <class ProbeType, class... Args>
  std::shared_ptr<ProbeType> watch(std::string what, Args&&... args) {
    auto probe = std::make_shared<ProbeType>(std::move(what), limit(), std::forward<Args>(args)...);
    const std::lock_guard lock(mutex_);
    probes_.push_back(probe);
    return probe;
  }
  /// @}

  /// The kinds of transfer that the transport can do.
  [[nodiscard]] std::vector<TransferKind> kinds() {
    std::vector<TransferKind> result;
    const Capabilities can = capabilities();
    if (can.send_recv) {
      result.insert(result.end(), {TransferKind::send, TransferKind::recv});
    }
    if (can.write) {
      result.push_back(TransferKind::write);
    }
    if (can.read) {
      result.push_back(TransferKind::read);
    }
    return result;
  }

  [[nodiscard]] static std::vector<std::uint64_t> consecutive(std::uint64_t first, std::size_t count) {
    std::vector<std::uint64_t> indexes(count);
    std::iota(indexes.begin(), indexes.end(), first);
    return indexes;
  }

  /// Moves a few bytes each way by all that the transport can do, and checks them. Uses the last pages of region 0, and
  /// leaves them as it found them.
  void expect_usable(Node& a, Node& b) {
    expect_usable_from(a, b);
    expect_usable_from(b, a);
  }

  void expect_usable_from(Node& from, Node& to) {
    SCOPED_TRACE("transfers from " + from.id() + " to " + to.id());
    const std::uint64_t seed = ++last_seed_ * 1'000'003;
    const Objects source = from.objects({100, 1, 333}).fill(seed);
    const Objects target = from.objects({100, 1, 333});
    const Capabilities can = capabilities();
    if (can.write || can.read) {
      expect_pages_usable(from, to, source, target, seed);
    }
    if (can.send_recv) {
      const Objects arrival = to.objects({100, 1, 333});
      const std::uint64_t tag = 0xfeed'0000'0000'0000 + seed;
      const auto recv = start(TransferKind::recv, to, from, arrival, tagged(tag));
      const auto send = start(TransferKind::send, from, to, source, tagged(tag));
      EXPECT_EQ(send->outcome(), done(3)) << send->diagnostic();
      EXPECT_EQ(recv->outcome(), done(3)) << recv->diagnostic();
      EXPECT_TRUE(arrival.match(seed));
    }
  }

  /// Runs a blocking call on a thread of its own.
  template <class Function>
  [[nodiscard]] static auto aside(Function function) {
    return std::async(std::launch::async, std::move(function));
  }

  /// The result of a blocking call; throws, and so fails the test, if it does not return in time.
  template <class Result>
  Result in_time(std::future<Result>& future) {
    if (future.wait_for(limit()) != std::future_status::ready) {
      throw std::runtime_error("a blocking call did not return within " + std::to_string(limit().count()) + " ms");
    }
    return future.get();
  }
  template <class Result>
  Result in_time(std::future<Result>&& future) {
    return in_time(future);
  }

 private:
  void expect_pages_usable(Node& from, Node& to, const Objects& source, const Objects& target, std::uint64_t seed) {
    const std::uint64_t pages = from->regions().empty() && to->regions().empty() ? 0 : to->regions()[0].page_count();
    const std::vector<std::uint64_t> indexes{pages - 1, pages - 3, pages - 2};
    const TransferSpec spec = at(indexes);
    if (capabilities().write) {
      const auto write = start(TransferKind::write, from, to, source, spec);
      ASSERT_EQ(write->outcome(), done(3)) << write->diagnostic();
    } else {
      for (std::size_t i = 0; i < 3; ++i) {
        fill(to.page(indexes[i]).first(source[i].size()), seed + i);
      }
    }
    for (std::size_t i = 0; i < 3; ++i) {
      EXPECT_TRUE(page_holds(to.page(indexes[i]), source[i].size(), seed + i));
    }
    if (capabilities().read) {
      const auto read = start(TransferKind::read, from, to, target, spec);
      ASSERT_EQ(read->outcome(), done(3)) << read->diagnostic();
      EXPECT_TRUE(target.match(seed));
    }
    for (const std::uint64_t index : indexes) {
      fill_constant(to.page(index), background);
    }
  }

  std::unique_ptr<TransportUnderTest> transport_;
  TraitsFacts facts_;
  std::optional<Watchdog> watchdog_;
  int last_node_number_ = 0;
  std::uint64_t last_seed_ = 0;
  std::mutex mutex_;
  std::vector<std::shared_ptr<ProbeBase>> probes_;
  std::list<Node> nodes_;
};

/// A test whose body is a member function of `Tests`, a class derived from `ConformanceBase`.
template <class Tests>
class ConformanceTest final : public Tests {
 public:
  using Body = void (Tests::*)();

  /// Makes the test for a transport.
  [[nodiscard]] static auto maker(Body body) {
    return [body](std::unique_ptr<TransportUnderTest> transport) -> ::testing::Test* {
      auto test = std::make_unique<ConformanceTest>(body);
      test->put_to_the_test(std::move(transport));
      return test.release();
    };
  }

  explicit ConformanceTest(Body body) : body_(body) {}

 private:
  void TestBody() override { (this->*body_)(); }

  const Body body_;
};

}  // namespace kvferry::testing
