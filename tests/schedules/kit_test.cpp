// SPDX-License-Identifier: Apache-2.0
// Parts of the kit by themselves, at moments that are rare elsewhere.
#include <gtest/gtest.h>

#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/link.hpp>

#include <kvferry/kit/fence.hpp>
#include <kvferry/kit/inbox_driver.hpp>
#include <kvferry/kit/notification_queue.hpp>
#include <kvferry/kit/operation_registry.hpp>
#include "scheduler.hpp"

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

using schedules::explore;

/// A thread that runs a context, as a channel's I/O thread does, and the deadlines that pass on it.
struct Deadlines {
  Deadlines() = default;
  Deadlines(const Deadlines&) = delete;
  Deadlines& operator=(const Deadlines&) = delete;
  ~Deadlines() {
    EXPECT_EQ(queue->size(), 0U) << "left in the deadline queue";
    queue->close();
    work.reset();
    thread.join();
  }

  asio::io_context context{1};
  asio::executor_work_guard<asio::io_context::executor_type> work{context.get_executor()};
  std::shared_ptr<DeadlineQueue> queue = std::make_shared<DeadlineQueue>(context.get_executor());
  std::thread thread{[this] { context.run(); }};
};

/// Ends an operation that is to stop as if it were at an end with it.
class StoppingLink final : public Link {
 public:
  void start(std::shared_ptr<Operation>) override {}
  void stop(std::shared_ptr<Operation> operation) override { operation->finish(operation->stop_cause()); }
  void shut(std::error_code, const std::string&) override {}
  [[nodiscard]] std::string path() const override { return "nowhere"; }
};

/// Answers a fence when it is told to.
class AskedLink final : public Link {
 public:
  void start(std::shared_ptr<Operation>) override {}
  void stop(std::shared_ptr<Operation>) override {}
  void shut(std::error_code, const std::string&) override {}
  [[nodiscard]] bool fence(std::function<void()> done) override {
    asked_ = std::move(done);
    return true;
  }
  [[nodiscard]] std::string path() const override { return "nowhere"; }

  void answer() { std::exchange(asked_, nullptr)(); }

 private:
  std::function<void()> asked_;
};

/// How often each of the two ways to end was seen: a test that never saw one of them tested nothing.
struct Ends {
  int in_success = 0;
  int in_error = 0;

  void count(std::error_code ec) { ++(ec ? in_error : in_success); }
  void expect_both() const {
    if (schedules::all_is_seen()) {
      EXPECT_GT(in_success, 0);
      EXPECT_GT(in_error, 0);
    }
  }
};

TEST(KitSchedules, ADeadlineThatPassesWhileTheCompletionIsDeliveredEndsTheOperationOnce) {
  Ends seen;
  explore(
      1000,
      [&] {
        int ends = 0;
        std::error_code cause;
        std::vector<std::byte> object(8);
        {
          Deadlines deadlines;
          const auto registry = std::make_shared<OperationRegistry>(deadlines.queue, 4);
          const auto link = std::make_shared<StoppingLink>();
          TransferRequest request;
          request.objects = {object};
          const auto operation =
              std::make_shared<Operation>(std::move(request), Completion::direct([&](std::error_code ec, std::size_t) {
                                            ++ends;
                                            cause = ec;
                                          }),
                                          Clock::now() + std::chrono::microseconds(20), registry);
          EXPECT_FALSE(registry->add(operation));
          operation->start_on(link);
          std::thread delivering([&] {
            operation->landed(0, 1);
            operation->finish({});
          });
          registry->wait_until_empty();
          delivering.join();
        }
        EXPECT_EQ(ends, 1);
        EXPECT_TRUE(!cause || cause == errc::timed_out) << cause.message();
        seen.count(cause);
      },
      schedules::leaping_time);
  seen.expect_both();
}

TEST(KitSchedules, ACloseThatMeetsNewOperationsEndsAllOfThem) {
  explore(500, [] {
    Deadlines deadlines;
    const auto registry = std::make_shared<OperationRegistry>(deadlines.queue, 4);
    int ends = 0;
    int made = 0;
    std::vector<std::byte> object(8);
    const auto link = std::make_shared<StoppingLink>();
    const auto start = [&] {
      for (int i = 0; i < 2; ++i) {
        TransferRequest request;
        request.objects = {object};
        ++made;
        const auto operation = std::make_shared<Operation>(
            std::move(request), Completion::direct([&](std::error_code, std::size_t) { ++ends; }),
            Clock::now() + std::chrono::hours(1), registry);
        if (const auto refused = registry->add(operation)) {
          operation->finish(refused);
        } else if (operation->finished()) {
          registry->remove(*operation);  // it ended before it was entered
        } else {
          operation->start_on(link);
        }
      }
    };
    std::thread first(start);
    std::thread second(start);
    registry->close(errc::closed);
    registry->wait_until_empty();
    first.join();
    second.join();
    EXPECT_EQ(ends, made);
  });
}

/// A user that waits for a notification, on a thread of its own.
struct Receiver {
  explicit Receiver(NotificationQueue& queue, std::optional<std::chrono::milliseconds> timeout) {
    queue.receive(timeout, NotificationCompletion(
                               asio::bind_executor(context, asio::bind_cancellation_slot(
                                                                signal.slot(),
                                                                [this](std::error_code ec, const Notification& got) {
                                                                  ++ends;
                                                                  cause = ec;
                                                                  notification = got;
                                                                })),
                               context.get_executor()));
  }
  Receiver(const Receiver&) = delete;
  Receiver& operator=(const Receiver&) = delete;
  void cancel() { signal.emit(asio::cancellation_type::all); }

  asio::io_context context{1};
  asio::cancellation_signal signal;
  int ends = 0;
  std::error_code cause;
  Notification notification;
};

void expect_one_notification(const NotificationQueue& queue, const Receiver& receiver, Ends& seen) {
  EXPECT_EQ(receiver.ends, 1);
  if (receiver.cause) {
    EXPECT_EQ(queue.pending(), 1U) << "lost";
  } else {
    EXPECT_EQ(queue.pending(), 0U) << "doubled";
    EXPECT_EQ(receiver.notification.peer_id, "peer");
  }
  seen.count(receiver.cause);
}

constexpr NotificationQueue::Bounds bounds{4, 4096, 4096};

TEST(KitSchedules, ANotificationThatComesWhileItsReceiverIsCancelledIsNeitherLostNorDoubled) {
  Ends seen;
  explore(1000, [&] {
    Deadlines deadlines;
    const auto queue = std::make_shared<NotificationQueue>(deadlines.queue, bounds);
    std::thread peer([&] { EXPECT_TRUE(queue->push({"peer", {}, 1})); });
    Receiver receiver(*queue, std::chrono::hours(1));
    receiver.cancel();
    receiver.context.run();
    peer.join();
    expect_one_notification(*queue, receiver, seen);
  });
  seen.expect_both();
}

TEST(KitSchedules, ANotificationThatComesWhileItsReceiverTimesOutIsNeitherLostNorDoubled) {
  Ends seen;
  explore(
      1500,
      [&] {
        Deadlines deadlines;
        const auto queue = std::make_shared<NotificationQueue>(deadlines.queue, bounds);
        std::thread peer([&] { EXPECT_TRUE(queue->push({"peer", {}, 1})); });
        Receiver receiver(*queue, std::chrono::milliseconds(1));
        receiver.context.run();
        peer.join();
        expect_one_notification(*queue, receiver, seen);
      },
      schedules::leaping_time);
  seen.expect_both();
}

TEST(KitSchedules, AQueueThatIsClosedEndsThoseWhoWaitAndThoseWhoCome) {
  explore(500, [] {
    Deadlines deadlines;
    const auto queue = std::make_shared<NotificationQueue>(deadlines.queue, bounds);
    std::thread closing([&] { queue->close(); });
    Receiver first(*queue, std::chrono::hours(1));
    Receiver second(*queue, std::nullopt);
    first.context.run();
    second.context.run();
    closing.join();
    for (const Receiver* const receiver : {&first, &second}) {
      EXPECT_EQ(receiver->ends, 1);
      EXPECT_EQ(receiver->cause, errc::closed);
    }
    EXPECT_FALSE(queue->push({"peer", {}, 1}));
    deadlines.queue->close();  // as the channel does then
  });
}

TEST(KitSchedules, AFenceThatIsAnsweredWhileItIsBegunLeavesNoDeadlineBehind) {
  explore(500, [] {
    Deadlines deadlines;
    int ends = 0;
    AskedLink link;
    const auto fence = std::make_shared<Fence>(FenceCompletion::direct([&](std::error_code) { ++ends; }),
                                               Clock::now() + std::chrono::hours(1), deadlines.queue);
    std::thread cancelling([&] { fence->end(errc::cancelled); });
    fence->wait_for(link, [] {});
    link.answer();
    cancelling.join();
    EXPECT_EQ(ends, 1);
  });
}

// The thread that cancels may be the last to hold the timer of a destroyed context, unless `close` waits at the gate.
TEST(KitSchedules, WhoCancelsAFenceHasLeftWhenItsChannelIsClosed) {
  explore(500, [] {
    Deadlines deadlines;
    asio::io_context users{1};
    asio::cancellation_signal signal;
    int ends = 0;
    auto fence = std::make_shared<Fence>(
        FenceCompletion(
            asio::bind_executor(users, asio::bind_cancellation_slot(signal.slot(), [&](std::error_code) { ++ends; })),
            users.get_executor()),
        Clock::now() + std::chrono::hours(1), deadlines.queue);
    fence->accept_cancellation();
    std::thread user([&] {
      signal.emit(asio::cancellation_type::all);
      users.run();
    });
    fence->end({});  // its link is shut
    fence.reset();
    deadlines.queue->gate()->close();
    EXPECT_EQ(deadlines.queue.use_count(), 1) << "held by a thread that is not the channel's";
    user.join();
    EXPECT_EQ(ends, 1);
  });
}

/// The entries that a driver finds in its inbox.
struct Notes {
  std::vector<int> notes;
};

TEST(KitSchedules, ADriverDoesWhatOthersLeaveWhileItStops) {
  explore(1000, [] {
    InboxDriver<Notes> driver;
    std::vector<int> done;
    const auto bring = [&](int note) {
      driver.put([&](Notes& inbox) { inbox.notes.push_back(note); });
      (void)driver.drive(
          [&](std::optional<Notes> taken) {
            if (taken) {
              done.insert(done.end(), taken->notes.begin(), taken->notes.end());
            }
            return 0;
          },
          [](int) { return true; });
    };
    std::thread first([&] { bring(1); });
    std::thread second([&] {
      driver.change([] {});
      bring(2);
    });
    bring(3);
    first.join();
    second.join();
    EXPECT_EQ(done.size(), 3U) << "something was left in the inbox, and nobody comes for it";
  });
}

TEST(KitSchedules, DeadlinesPassInTheirOrderAndNoneIsMissed) {
  explore(
      500,
      [] {
        struct Entry final : Expirable {
          explicit Entry(std::function<void()> what) : run(std::move(what)) {}
          void expire() override { run(); }
          std::function<void()> run;
        };
        Deadlines deadlines;
        std::mutex mutex;
        std::condition_variable all;
        int passed = 0;
        const auto add = [&](std::chrono::milliseconds after) {
          const auto deadline = Clock::now() + after;
          deadlines.queue->add(deadline, std::make_shared<Entry>([&, deadline] {
                                 EXPECT_GE(Clock::now(), deadline);
                                 EXPECT_LE(Clock::now(), deadline + std::chrono::milliseconds(2));
                                 const std::lock_guard lock(mutex);
                                 ++passed;
                                 all.notify_all();
                               }));
        };
        std::thread first([&] {
          add(std::chrono::milliseconds(500));
          add(std::chrono::milliseconds(20));
        });
        add(std::chrono::milliseconds(50));
        add(std::chrono::milliseconds(10));
        first.join();
        std::unique_lock lock(mutex);
        all.wait(lock, [&] { return passed == 4; });
      },
      schedules::steady_time);
}

}  // namespace
}  // namespace kvferry::kit
