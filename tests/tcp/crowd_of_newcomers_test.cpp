// SPDX-License-Identifier: Apache-2.0
// More connections name a handshake than a peer of it makes: they wait, and others don't.
#include <gtest/gtest.h>

#include <asio/error.hpp>
#include <asio/ip/tcp.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include <kvferry/tcp/data_acceptor.hpp>

#include "common/patience.hpp"
#include "tcp/data_acceptor_fixture.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using asio::ip::tcp;
using testing::DataAcceptorTest;

/// Many connections name a handshake, of which two are to come.
class DataAcceptorInACrowd : public DataAcceptorTest {
 protected:
  static constexpr std::size_t at_once = 12;  ///< Twice as many as are to come, and 8.

  struct Named {
    tcp::socket socket;
    std::unique_ptr<TlsStream> tls;
    /// The acceptor has shown that it has the key.
    [[nodiscard]] bool is_answered() {
      if (!answered) {
        answered = !tls->shake_hands();
      }
      return answered;
    }
    bool answered = false;
  };

  DataAcceptorInACrowd() {
    LinkOptions options;
    options.hello_timeout = std::chrono::hours(1);
    options.tls = tls_;
    acceptor_ = std::make_shared<DataAcceptor>(context_.get_executor(), options, refusals_);
    acceptor_->listen("127.0.0.1", 0, std::chrono::seconds(30));
    one_ = handshake();
    while (crowd_.size() < at_once) {
      crowd_.push_back(named(one_));
    }
    EXPECT_TRUE(comes_true(
        [this] { return std::ranges::all_of(crowd_, [](const auto& newcomer) { return newcomer->is_answered(); }); }));
  }

  TlsKey handshake() { return key_of(expect(std::chrono::hours(1))); }
  /// Has said the first words of TLS.
  std::unique_ptr<Named> named(const TlsKey& key) {
    auto made = std::make_unique<Named>(Named{tcp::socket(context_, tcp::v4()), nullptr});
    made->socket.connect({asio::ip::address_v4::loopback(), acceptor_->port()});
    made->socket.non_blocking(true);
    made->tls = tls_->dial(made->socket.native_handle(), key);
    EXPECT_EQ(made->tls->shake_hands(), asio::error::would_block);
    return made;
  }
  /// The acceptor does its work until then.
  template <class Condition>
  bool comes_true(Condition condition) {
    const auto deadline = kit::Clock::now() + kvferry_test::long_enough;
    while (!condition() && kit::Clock::now() < deadline) {
      context_.run_one_for(std::chrono::milliseconds(10));
    }
    return condition();
  }

  const std::shared_ptr<TlsContext> tls_ = TlsContext::create();
  TlsKey one_;
  std::vector<std::unique_ptr<Named>> crowd_;
};

TEST_F(DataAcceptorInACrowd, WhoComesLaterIsServedBeforeFurtherOnesOfTheSameHandshake) {
  std::vector<std::unique_ptr<Named>> further;
  for (int i = 0; i < 40; ++i) {
    further.push_back(named(one_));
  }
  const TlsKey other = handshake();
  const auto newcomer = named(other);
  EXPECT_TRUE(comes_true([&] { return newcomer->is_answered(); }));
  const auto wait_still = [&] {
    return std::ranges::count_if(further, [](const auto& one) { return !one->is_answered(); });
  };
  EXPECT_GT(wait_still(), 0);
  EXPECT_TRUE(comes_true([&] { return wait_still() == 0; })) << "their turns come";
}

TEST_F(DataAcceptorInACrowd, FurtherOnesOfAHandshakeMakeRoomBeforeOlderConnections) {
  tcp::socket silent = stranger();
  std::vector<std::byte> said;
  std::vector<std::unique_ptr<Named>> further;
  while (refusals_->snapshot().empty()) {
    further.push_back(named(one_));
    ASSERT_LT(further.size(), 4096U);
    context_.poll();
  }
  EXPECT_FALSE(is_closed(silent, said));
  EXPECT_FALSE(is_closed(crowd_.front()->socket, said));
}

}  // namespace
}  // namespace kvferry::tcp
