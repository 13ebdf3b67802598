// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/kit/transfer_channel_kit.hpp>

#include "common/patience.hpp"

namespace kvferry::inline KVFERRY_ABI::kit::tests {

/// Keeps the operations that it is given.
class KeepingLink : public Link {
 public:
  void start(std::shared_ptr<Operation> operation) override {
    const std::lock_guard lock(mutex_);
    operations_.push_back(std::move(operation));
  }
  void stop(std::shared_ptr<Operation>) override {}
  void shut(std::error_code cause, const std::string& why) override { end_all(cause, why); }
  [[nodiscard]] std::string path() const override { return "nowhere"; }

  void end_all(std::error_code cause, const std::string& why) {
    std::vector<std::shared_ptr<Operation>> operations;
    {
      const std::lock_guard lock(mutex_);
      operations.swap(operations_);
    }
    for (const auto& operation : operations) {
      operation->finish(cause, why);
    }
  }

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<Operation>> operations_;
};

/// Never gets anywhere.
class NoDial final : public Dial {
 public:
  [[nodiscard]] Bytes local_endpoint() override { return {}; }
  void connect(std::shared_ptr<LinkHost>, const Bytes&, Clock::time_point, LinkHandler) override {}
};

/// A transport of the kit's that moves nothing, over links of the test's.
class TestChannel final : public TransferChannelKit {
 public:
  using MakeLink = std::function<std::shared_ptr<Link>(std::shared_ptr<LinkHost>)>;
  using TakeHandler = std::function<void(std::shared_ptr<LinkHost>, LinkHandler)>;

  TestChannel(ChannelOptions options, MakeLink make_link)
      : TransferChannelKit(kvferry_test::patient(std::move(options))), make_link_(std::move(make_link)) {
    start();
  }
  TestChannel(const TestChannel&) = delete;
  TestChannel& operator=(const TestChannel&) = delete;
  ~TestChannel() override {
    close();
    run_handlers_left();
  }

  /// Takes the handlers of accepted links, which are then not made at once. To be called before anybody asks.
  void when_accepting(TakeHandler take) { take_ = std::move(take); }
  /// The same for links that are dialed. Before anybody connects.
  void when_dialing(TakeHandler take) { take_dialed_ = std::move(take); }
  /// How often a connection has been begun from here.
  [[nodiscard]] int dials() const noexcept { return dials_; }

  [[nodiscard]] std::string_view transport() const noexcept override { return "test"; }
  [[nodiscard]] Capabilities capabilities() const noexcept override {
    Capabilities all;
    all.write = true;
    return all;
  }

 protected:
  [[nodiscard]] std::unique_ptr<Dial> dial(const std::string&) override {
    ++dials_;
    return std::make_unique<TestDial>(make_link_, take_dialed_);
  }
  [[nodiscard]] Bytes accept(std::shared_ptr<LinkHost> host, const Bytes&, Clock::time_point,
                             LinkHandler on_link) override {
    if (take_) {
      take_(std::move(host), std::move(on_link));
    } else {
      on_link({}, make_link_(std::move(host)), {});
    }
    return {};
  }

 private:
  class TestDial final : public Dial {
   public:
    TestDial(MakeLink make_link, TakeHandler take) : make_link_(std::move(make_link)), take_(std::move(take)) {}
    [[nodiscard]] Bytes local_endpoint() override { return {}; }
    void connect(std::shared_ptr<LinkHost> host, const Bytes&, Clock::time_point, LinkHandler on_link) override {
      if (take_) {
        take_(std::move(host), std::move(on_link));
      } else {
        on_link({}, make_link_(std::move(host)), {});
      }
    }

   private:
    const MakeLink make_link_;
    const TakeHandler take_;
  };

  const MakeLink make_link_;
  TakeHandler take_;
  TakeHandler take_dialed_;
  std::atomic<int> dials_{0};
};

}  // namespace kvferry::kit::tests
