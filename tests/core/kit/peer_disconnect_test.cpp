// SPDX-License-Identifier: Apache-2.0
// Taking leave of a peer while others are on their way to it.
#include <gtest/gtest.h>

#include <asio/io_context.hpp>

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/handshake/handshake_mailbox.hpp>
#include <kvferry/side_message_codec.hpp>

#include <kvferry/kit/init_messages.hpp>
#include <kvferry/kit/peer_directory.hpp>
#include "test_channel.hpp"

namespace kvferry::inline KVFERRY_ABI::kit::tests {
namespace {

/// A table of peers without a channel, in which "p" has been connected, and answers nowhere. The test runs its timers.
class Leaving : public ::testing::Test {
 protected:
  Leaving() { directory_->use(service_, {}); }
  ~Leaving() override {
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
    question.init_url = "tcp://127.0.0.1:1";
    directory_->answer(encode_side_message(question), HandshakeService::Reply(nullptr));
    ASSERT_TRUE(directory_->usable("p"));
  }
  void break_link() { host_->link_failed(*link_, errc::connection_lost); }

  [[nodiscard]] std::shared_ptr<Operation> add_write() {
    TransferRequest request;
    request.kind = TransferKind::write;
    request.peer_id = "p";
    auto operation =
        std::make_shared<Operation>(std::move(request), Completion::direct([](std::error_code, std::size_t) {}),
                                    Clock::now() + std::chrono::hours(1), operations_);
    EXPECT_FALSE(operations_->add(operation));
    return operation;
  }

  asio::io_context context_;
  const ChannelOptions options_;
  const std::shared_ptr<DeadlineQueue> deadlines_ = std::make_shared<DeadlineQueue>(context_.get_executor());
  const std::shared_ptr<OperationRegistry> operations_ = std::make_shared<OperationRegistry>(deadlines_, 16);
  int dials_ = 0;
  std::shared_ptr<Link> link_;
  std::shared_ptr<LinkHost> host_;
  HandshakeService service_{{}, [](const SideMessage&, const HandshakeService::Reply&) {}};
  const std::shared_ptr<PeerDirectory> directory_ = std::make_shared<PeerDirectory>(
      options_, std::make_shared<RegionTable>(options_.regions), 1,
      TransportHooks{"test", false,
                     [this](const std::string&) {
                       ++dials_;
                       return std::make_unique<NoDial>();
                     },
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

TEST_F(Leaving, AnOperationThatWasStoppedOnItsWayConnectsToNobody) {
  connect(std::make_shared<KeepingLink>());
  break_link();
  const auto stopped = add_write();
  (void)operations_->stop("p", errc::cancelled);
  directory_->route(stopped);
  EXPECT_EQ(dials_, 0);
  const auto another = add_write();
  directory_->route(another);
  EXPECT_EQ(dials_, 1);
  EXPECT_FALSE(directory_->awaited("p").empty());
  another->finish(errc::timed_out);
}

TEST_F(Leaving, NothingIsDialedForOperationsThatWereStopped) {
  connect(std::make_shared<KeepingLink>());
  break_link();
  // Comes to the table when the peer's calls have been ended, and its operations have not.
  const auto late = add_write();
  std::error_code told;
  directory_->connect("here", "p", "tcp://127.0.0.1:1", 0,
                      {Clock::now() + std::chrono::hours(1),
                       [&](const Failure& failure) {
                         told = failure.code;
                         directory_->route(late);
                       },
                       [&] { return static_cast<bool>(told); }});
  directory_->disconnect("p", [](std::error_code) {});
  EXPECT_EQ(told, errc::cancelled);
  EXPECT_TRUE(late->finished());
  EXPECT_EQ(dials_, 2);
  EXPECT_TRUE(directory_->awaited("p").empty()) << directory_->awaited("p");
}

/// Has something to say for as long as the test wants.
class StayingLink final : public KeepingLink {
 public:
  [[nodiscard]] std::optional<Pause> take_leave() override {
    return stays ? std::optional(Pause{{}, Clock::now()}) : std::nullopt;
  }
  void shut(std::error_code cause, const std::string& why) override {
    is_shut = true;
    KeepingLink::shut(cause, why);
  }

  bool stays = true;
  bool is_shut = false;
};

TEST_F(Leaving, ASecondDisconnectWaitsForTheFirstOnesGoodbye) {
  const auto link = std::make_shared<StayingLink>();
  connect(link);
  std::vector<int> done;
  directory_->disconnect("p", [&](std::error_code) { done.push_back(1); });
  directory_->disconnect("p", [&](std::error_code) { done.push_back(2); });
  for (int i = 0; i < 10; ++i) {
    context_.run_one();
  }
  EXPECT_FALSE(link->is_shut);
  EXPECT_TRUE(done.empty());
  link->stays = false;
  while (done.size() < 2 && context_.run_one() != 0) {
  }
  EXPECT_TRUE(link->is_shut);
  EXPECT_EQ(done, (std::vector<int>{1, 2}));
}

TEST_F(Leaving, AFirstDisconnectSparesASecondOnesLink) {
  connect(std::make_shared<KeepingLink>());
  bool first = false;
  bool second = false;
  directory_->disconnect("p", [&](std::error_code) { first = true; });
  const auto link = std::make_shared<StayingLink>();
  connect(link);
  directory_->disconnect("p", [&](std::error_code) { second = true; });
  while (!first && context_.run_one() != 0) {
  }
  EXPECT_FALSE(link->is_shut);
  EXPECT_FALSE(second);
  link->stays = false;
  while (!second && context_.run_one() != 0) {
  }
  EXPECT_TRUE(link->is_shut && second);
}

}  // namespace
}  // namespace kvferry::kit::tests
