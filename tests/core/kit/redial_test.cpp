// SPDX-License-Identifier: Apache-2.0
// A connection that is made anew: in which order the old one ends and the new one begins.
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/transfer_channel_kit.hpp>
#include <kvferry/testing/own_loopback.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

/// The events of a channel's links, in order.
class Story {
 public:
  void tell(std::string what) {
    const std::lock_guard lock(mutex_);
    events_.push_back(std::move(what));
  }
  [[nodiscard]] std::vector<std::string> events() {
    const std::lock_guard lock(mutex_);
    return events_;
  }

 private:
  std::mutex mutex_;
  std::vector<std::string> events_;
};

class ToldLink final : public Link {
 public:
  ToldLink(std::shared_ptr<Story> story, std::string name) : story_(std::move(story)), name_(std::move(name)) {}
  void start(std::shared_ptr<Operation> operation) override { operation->finish({}, {}); }
  void stop(std::shared_ptr<Operation>) override {}
  void shut(std::error_code, const std::string&) override { story_->tell("shut " + name_); }
  [[nodiscard]] std::string path() const override { return name_; }

 private:
  const std::shared_ptr<Story> story_;
  const std::string name_;
};

/// A channel whose links break when the test says so, and are shut by nobody then.
class ToldChannel final : public TransferChannelKit {
 public:
  ToldChannel(ChannelOptions options, std::shared_ptr<Story> story)
      : TransferChannelKit(std::move(options)), story_(std::move(story)) {
    start();
  }
  ToldChannel(const ToldChannel&) = delete;
  ToldChannel& operator=(const ToldChannel&) = delete;
  ~ToldChannel() override {
    close();
    run_handlers_left();
  }

  void break_link() { host_->link_failed(*link_, errc::connection_lost); }

  [[nodiscard]] std::string_view transport() const noexcept override { return "told"; }
  [[nodiscard]] Capabilities capabilities() const noexcept override {
    Capabilities all;
    all.write = true;
    return all;
  }

 protected:
  [[nodiscard]] std::unique_ptr<Dial> dial(const std::string&) override { return std::make_unique<ToldDial>(*this); }
  [[nodiscard]] Bytes accept(std::shared_ptr<LinkHost>, const Bytes&, Clock::time_point, LinkHandler on_link) override {
    on_link({}, std::make_shared<ToldLink>(story_, "accepted"), {});
    return {};
  }

 private:
  class ToldDial final : public Dial {
   public:
    explicit ToldDial(ToldChannel& channel) : channel_(channel) {}
    [[nodiscard]] Bytes local_endpoint() override { return {}; }
    void connect(std::shared_ptr<LinkHost> host, const Bytes&, Clock::time_point, LinkHandler on_link) override {
      const std::string name = "link " + std::to_string(++channel_.made_);
      channel_.story_->tell("connect " + name);
      channel_.host_ = std::move(host);
      channel_.link_ = std::make_shared<ToldLink>(channel_.story_, name);
      on_link({}, channel_.link_, {});
    }

   private:
    ToldChannel& channel_;
  };

  const std::shared_ptr<Story> story_;
  int made_ = 0;  // this and the next ones are touched by one attempt at a time
  std::shared_ptr<LinkHost> host_;
  std::shared_ptr<Link> link_;
};

TEST(Redial, APeerIsGreetedWhenNothingReachesThisSideOverTheOldConnectionAnyMore) {
  std::vector<std::byte> memory(4096);
  ChannelOptions options;
  options.handshake_timeout = std::chrono::minutes(1);
  options.regions = {{memory.data(), memory.size(), memory.size()}};
  options.peer_init_url = kvferry::testing::own_loopback_url();
  ToldChannel b(options, std::make_shared<Story>());
  options.peer_init_url.clear();
  const auto story = std::make_shared<Story>();
  ToldChannel a(options, story);
  a.lazy_init_peer_connection("a", "b", b.peer_init_url());
  a.break_link();
  a.lazy_init_peer_connection("a", "b", b.peer_init_url());
  const auto events = story->events();
  ASSERT_GE(events.size(), 3U);
  EXPECT_EQ(events[0], "connect link 1");
  EXPECT_EQ(events[1], "shut link 1");
  EXPECT_EQ(events[2], "connect link 2");
}

}  // namespace
}  // namespace kvferry::kit
