// SPDX-License-Identifier: Apache-2.0
// A cancellation slot that is emitted while its channel is being destroyed.
#include <gtest/gtest.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <latch>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/transfer_channel_kit.hpp>

#include "core/kit/gate.hpp"

namespace kvferry::kit {
namespace {

/// Where the thread that cancels is, and where the one that destroys.
struct Meeting {
  std::latch cancelling{1};
  std::mutex mutex;
  std::condition_variable changed;
  bool destroyed = false;
  std::atomic<bool> left{false};

  /// By the one that cancels: until the channel is gone. It waits for this thread, so not for long.
  void wait_for_the_end() {
    cancelling.count_down();
    std::unique_lock lock(mutex);
    changed.wait_for(lock, std::chrono::milliseconds(500), [this] { return destroyed; });
    left = true;
  }
  void end() {
    const std::lock_guard lock(mutex);
    destroyed = true;
    changed.notify_all();
  }
};

/// Keeps its operations until it is shut.
class IdleLink final : public Link {
 public:
  explicit IdleLink(std::shared_ptr<Meeting> meeting) : meeting_(std::move(meeting)) {}

  void start(std::shared_ptr<Operation> operation) override {
    const std::lock_guard lock(mutex_);
    operations_.push_back(std::move(operation));
  }
  void stop(std::shared_ptr<Operation>) override { meeting_->wait_for_the_end(); }
  void shut(std::error_code cause, const std::string& why) override {
    std::vector<std::shared_ptr<Operation>> operations;
    {
      const std::lock_guard lock(mutex_);
      operations.swap(operations_);
    }
    for (const auto& operation : operations) {
      operation->finish(cause, why);
    }
  }
  [[nodiscard]] std::string path() const override { return "nowhere"; }

 private:
  const std::shared_ptr<Meeting> meeting_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Operation>> operations_;
};

class IdleDial final : public Dial {
 public:
  explicit IdleDial(std::shared_ptr<Meeting> meeting) : meeting_(std::move(meeting)) {}
  [[nodiscard]] Bytes local_endpoint() override { return {}; }
  void connect(std::shared_ptr<LinkHost>, const Bytes&, Clock::time_point, LinkHandler on_link) override {
    on_link({}, std::make_shared<IdleLink>(meeting_), {});
  }

 private:
  const std::shared_ptr<Meeting> meeting_;
};

class IdleChannel final : public TransferChannelKit {
 public:
  IdleChannel(ChannelOptions options, std::shared_ptr<Meeting> meeting)
      : TransferChannelKit(std::move(options)), meeting_(std::move(meeting)) {
    start();
  }
  IdleChannel(const IdleChannel&) = delete;
  IdleChannel& operator=(const IdleChannel&) = delete;
  ~IdleChannel() override {
    close();
    run_handlers_left();
  }

  [[nodiscard]] std::string_view transport() const noexcept override { return "idle"; }
  [[nodiscard]] Capabilities capabilities() const noexcept override {
    Capabilities all;
    all.write = true;
    return all;
  }

 protected:
  [[nodiscard]] std::unique_ptr<Dial> dial(const std::string&) override { return std::make_unique<IdleDial>(meeting_); }
  [[nodiscard]] Bytes accept(std::shared_ptr<LinkHost>, const Bytes&, Clock::time_point, LinkHandler on_link) override {
    on_link({}, std::make_shared<IdleLink>(meeting_), {});
    return {};
  }

 private:
  const std::shared_ptr<Meeting> meeting_;
};

TEST(Gate, IsLeftByACancellationThatThrows) {
  const auto gate = std::make_shared<Gate>();
  const auto object = std::make_shared<int>(0);
  const auto cancel = cancellation(gate, std::weak_ptr<int>(object), [](int& calls) {
    ++calls;
    throw std::bad_alloc();
  });
  EXPECT_THROW(cancel(asio::cancellation_type::all), std::bad_alloc);
  gate->close();  // waits for whoever is in
  EXPECT_NO_THROW(cancel(asio::cancellation_type::all));
  EXPECT_EQ(*object, 1);
}

TEST(Gate, AChannelIsNotGoneBeforeWhoeverCancelsHasLeft) {
  const auto meeting = std::make_shared<Meeting>();
  std::vector<std::byte> memory(4096);
  ChannelOptions options;
  options.regions = {{memory.data(), memory.size(), memory.size()}};
  options.peer_init_url = "tcp://127.0.0.1:0";
  IdleChannel b(options, meeting);
  options.peer_init_url.clear();
  auto a = std::make_unique<IdleChannel>(options, meeting);
  a->lazy_init_peer_connection("a", "b", b.peer_init_url());

  // Slots are emitted where their handlers run: on the user's executor.
  asio::io_context users;
  asio::cancellation_signal signal;
  const std::vector<std::uint64_t> page{0};
  std::error_code ended;
  a->async_batched_write({ConstBuffer(memory.data(), memory.size())}, {.peer_id = "b", .remote_indexes = page},
                         asio::bind_executor(users, asio::bind_cancellation_slot(
                                                        signal.slot(), [&](std::error_code ec, std::size_t) { ended = ec; })));
  std::thread user([&] {
    asio::post(users, [&] { signal.emit(asio::cancellation_type::all); });
    users.run();
  });
  meeting->cancelling.wait();
  a.reset();
  EXPECT_TRUE(meeting->left) << "the user's thread may hold the last timer of a context that is gone";
  meeting->end();
  user.join();
  EXPECT_EQ(ended, errc::closed);
}

}  // namespace
}  // namespace kvferry::kit
