// SPDX-License-Identifier: Apache-2.0
// A fence ends, whatever becomes of the question that its link took.
#include <kvferry/kit/fence.hpp>

#include <gtest/gtest.h>

#include <asio/io_context.hpp>

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <utility>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

/// Keeps the question, and never answers by itself.
class SilentLink final : public Link {
 public:
  void start(std::shared_ptr<Operation>) override {}
  void stop(std::shared_ptr<Operation>) override {}
  void shut(std::error_code, const std::string&) override {}
  [[nodiscard]] bool fence(std::function<void()> done) override {
    question = std::move(done);
    return true;
  }
  [[nodiscard]] std::string path() const override { return "nowhere"; }

  std::function<void()> question;
};

class FenceOnALink : public ::testing::Test {
 protected:
  void begin(std::chrono::milliseconds timeout) {
    std::make_shared<Fence>(FenceCompletion::direct([this](std::error_code ec) { ended_ = ec; }),
                            Clock::now() + timeout, deadlines_)
        ->wait_for(link_, [this] {
          EXPECT_FALSE(ended_);
          ++broken_;
        });
  }

  void run_until_it_ends() {
    while (!ended_ && context_.run_one_for(std::chrono::seconds(10)) != 0) {
    }
    ASSERT_TRUE(ended_);
  }

  asio::io_context context_;
  std::shared_ptr<DeadlineQueue> deadlines_ = std::make_shared<DeadlineQueue>(context_.get_executor());
  SilentLink link_;
  std::optional<std::error_code> ended_;
  int broken_ = 0;
};

TEST_F(FenceOnALink, EndsWithTheAnswer) {
  begin(std::chrono::hours(1));
  EXPECT_FALSE(ended_);
  link_.question();
  EXPECT_EQ(ended_, std::optional(std::error_code()));
  link_.question = nullptr;
  context_.poll();
  EXPECT_EQ(broken_, 0);
}

TEST_F(FenceOnALink, BreaksALinkThatLosesTheQuestion) {
  begin(std::chrono::hours(1));
  link_.question = nullptr;
  EXPECT_EQ(broken_, 0) << "locks of the link's may be held";
  run_until_it_ends();
  EXPECT_FALSE(*ended_);
  EXPECT_EQ(broken_, 1);
}

TEST_F(FenceOnALink, EndsAtItsDeadlineThoughABrokenLinkDoesNotAnswer) {
  begin(std::chrono::milliseconds(1));
  run_until_it_ends();
  EXPECT_FALSE(*ended_);
  EXPECT_EQ(broken_, 1);
  link_.question();
}

TEST_F(FenceOnALink, EndsWithItsChannelThoughTheQuestionIsLost) {
  begin(std::chrono::hours(1));
  deadlines_->close();
  EXPECT_FALSE(ended_);
  link_.question = nullptr;
  EXPECT_EQ(ended_, std::optional(std::error_code(errc::closed)));
}

}  // namespace
}  // namespace kvferry::kit
