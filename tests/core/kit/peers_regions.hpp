// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/io_context.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/handshake/handshake_mailbox.hpp>
#include <kvferry/side_message_codec.hpp>

#include <kvferry/kit/init_messages.hpp>
#include <kvferry/kit/peer_directory.hpp>
#include <kvferry/kit/region_removals.hpp>
#include <kvferry/kit/region_table.hpp>

#include "test_channel.hpp"

namespace kvferry::inline KVFERRY_ABI::kit::tests {

inline std::byte some_memory[64];
inline const MemoryRegion some_region{some_memory, sizeof(some_memory), 16, Access::read_write};

inline std::uint32_t add_to(RegionTable& table) {
  return table.add(some_region, [](const LocalRegion&) {});
}

/// A link that answers when the test says so.
class RegionsLink final : public KeepingLink {
 public:
  explicit RegionsLink(bool can_ask = true) : can_ask_(can_ask) {}

  [[nodiscard]] bool region_removed(std::uint32_t number, std::function<void()> done) override {
    removed.push_back(number);
    if (when_asked) {
      when_asked();
    }
    if (can_ask_) {
      answers.push_back(std::move(done));
    }
    if (has_been_asked) {
      has_been_asked();  // another thread may shut the link from here on
    }
    return can_ask_;
  }
  void ask_regions(std::function<void()> done) override { questions.push_back(std::move(done)); }
  void stop(std::shared_ptr<Operation>) override {
    ++stops;
    if (when_stopped) {
      when_stopped();
    }
  }
  void shut(std::error_code cause, const std::string& why) override {
    shut_for = cause;
    for (const auto& answer : std::exchange(answers, {})) {
      answer();
    }
    KeepingLink::shut(cause, why);
  }

  std::vector<std::uint32_t> removed;
  std::vector<std::function<void()>> answers;
  std::vector<std::function<void()>> questions;
  std::error_code shut_for;
  std::function<void()> when_asked;
  std::function<void()> has_been_asked;
  std::function<void()> when_stopped;
  int stops = 0;

 private:
  const bool can_ask_;
};

/// A table of peers without a channel, to which "p" connects with a region of its own. The test runs its timers.
class PeersRegions : public ::testing::Test {
 protected:
  PeersRegions() { directory_->use(service_, {}); }
  ~PeersRegions() override {
    operations_->close(errc::closed);
    directory_->close();
    service_.close();
  }

  void connect(const std::shared_ptr<Link>& link) {
    link_ = link;
    InitQuestion question;
    question.transport = "test";
    question.sender_id = "p";
    question.receiver_id = "here";
    question.incarnation = 2;
    question.regions = {{64, 16, 3}};
    directory_->answer(encode_side_message(question), HandshakeService::Reply(nullptr));
    ASSERT_TRUE(directory_->usable("p"));
  }

  /// A write of one object, to the peer's region of this number.
  std::shared_ptr<Operation> start(std::uint32_t number) {
    TransferRequest request;
    request.kind = TransferKind::write;
    request.peer_id = "p";
    request.objects = {MutableBuffer(some_memory, 16)};
    request.remote_indexes = {0};
    request.remote_region = number;
    auto operation = std::make_shared<Operation>(
        std::move(request), Completion::direct([this](std::error_code ec, std::size_t) { ends_.push_back(ec); }),
        Clock::now() + std::chrono::hours(1), operations_);
    EXPECT_FALSE(operations_->add(operation));
    directory_->route(operation);
    return operation;
  }

  /// Takes this side's region 0 back.
  void remove(std::chrono::milliseconds timeout, std::vector<std::error_code>& ends) {
    removals_->remove(0, Clock::now() + timeout,
                      RemoveRegionCompletion::direct([&ends](std::error_code ec) { ends.push_back(ec); }), directory_);
  }

  [[nodiscard]] bool finished(const std::vector<std::error_code>& ends) {
    return run_until([&] { return !ends.empty(); });
  }

  /// Runs what is due until `done()`.
  template <class Done>
  [[nodiscard]] bool run_until(Done done) {
    const auto limit = Clock::now() + std::chrono::seconds(20);
    while (!done() && Clock::now() < limit) {
      context_.restart();
      (void)context_.run_one_for(std::chrono::milliseconds(20));
    }
    return done();
  }

  asio::io_context context_;
  const ChannelOptions options_;
  const std::shared_ptr<RegionTable> table_ = std::make_shared<RegionTable>(std::vector<MemoryRegion>(2, some_region));
  const std::shared_ptr<DeadlineQueue> deadlines_ = std::make_shared<DeadlineQueue>(context_.get_executor());
  const std::shared_ptr<OperationRegistry> operations_ = std::make_shared<OperationRegistry>(deadlines_, 16);
  std::vector<std::uint32_t> forgotten_;
  const std::shared_ptr<RegionRemovals> removals_ =
      std::make_shared<RegionRemovals>(table_, operations_, deadlines_, context_.get_executor(),
                                       [this](std::uint32_t number) { forgotten_.push_back(number); });
  std::shared_ptr<Link> link_;
  std::shared_ptr<LinkHost> host_;
  std::vector<std::error_code> ends_;
  HandshakeService service_{{}, [](const SideMessage&, const HandshakeService::Reply&) {}};
  const std::shared_ptr<PeerDirectory> directory_ = std::make_shared<PeerDirectory>(
      options_, table_, 1,
      TransportHooks{"test", true, [](const std::string&) { return std::make_unique<NoDial>(); },
                     [this](std::shared_ptr<LinkHost> host, const Bytes&, Clock::time_point, LinkHandler on_link) {
                       host_ = std::move(host);
                       on_link({}, link_, {});
                       return Bytes();
                     },
                     [](const std::string&, std::size_t, const std::function<void()>& answer) {
                       answer();
                       return true;
                     }},
      deadlines_, std::make_shared<NotificationQueue>(deadlines_, NotificationQueue::Bounds{16, 4096, 4096}),
      std::make_shared<PeerEvents>(deadlines_, 16), operations_, std::make_shared<Logger>());
};

}  // namespace kvferry::kit::tests
