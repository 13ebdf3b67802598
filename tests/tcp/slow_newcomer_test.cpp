// SPDX-License-Identifier: Apache-2.0
// A data connection whose keys are being agreed on by a thread that doesn't get on: it holds up nobody else.
#include <gtest/gtest.h>

#include <asio/error.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <future>
#include <memory>
#include <span>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/tcp/data_acceptor.hpp>

#include "common/patience.hpp"
#include "tcp/data_acceptor_fixture.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp {
namespace {

using asio::ip::tcp;
using testing::DataAcceptorTest;

/// The first handshake of TLS's that is accepted stops at its first step, until it is let go.
class HeldTls final : public TlsContext {
 public:
  [[nodiscard]] std::shared_ptr<const TlsCertificates> read_certificates(const CertificateFiles& files) override {
    return real_->read_certificates(files);
  }
  [[nodiscard]] std::unique_ptr<TlsStream> dial(int descriptor, const TlsKey& key) override {
    return real_->dial(descriptor, key);
  }
  [[nodiscard]] std::unique_ptr<TlsStream> accept(int descriptor, std::span<const std::byte> opening,
                                                  FindKey find) override {
    auto stream = real_->accept(descriptor, opening, std::move(find));
    if (!held_one_.exchange(true)) {
      begun.set_value();
      go_on_.wait();
    }
    return stream;
  }

  std::promise<void> begun;
  std::promise<void> let_go;

 private:
  const std::shared_ptr<TlsContext> real_ = TlsContext::create();
  std::future<void> go_on_ = let_go.get_future();
  std::atomic<bool> held_one_ = false;
};

/// While a newcomer's keys are being agreed on, by a thread that doesn't get on.
class DataAcceptorWithASlowNewcomer : public DataAcceptorTest {
 protected:
  static constexpr int wait_ms = 30'000;

  DataAcceptorWithASlowNewcomer() {
    LinkOptions options;
    options.hello_timeout = std::chrono::hours(1);
    options.tls = tls_;
    acceptor_ = std::make_shared<DataAcceptor>(context_.get_executor(), options, refusals_);
    acceptor_->listen("127.0.0.1", 0, std::chrono::seconds(30));
    key_ = key_of(expect(std::chrono::hours(1)));
    slow_ = newcomer();
    auto begun = tls_->begun.get_future();
    for (int i = 0; i < 2; ++i) {
      threads_.emplace_back([this] { context_.run(); });
    }
    EXPECT_EQ(begun.wait_for(kvferry_test::long_enough), std::future_status::ready);
  }
  ~DataAcceptorWithASlowNewcomer() override {
    let_go();
    acceptor_->close();
    threads_.clear();
  }

  void let_go() {
    if (!std::exchange(gone_on_, true)) {
      tls_->let_go.set_value();
    }
  }

  struct Newcomer {
    tcp::socket socket;
    std::unique_ptr<TlsStream> tls;
  };

  /// A newcomer that has sent the first bytes of TLS.
  std::unique_ptr<Newcomer> newcomer() {
    auto made = std::make_unique<Newcomer>(Newcomer{tcp::socket(other_context_, tcp::v4()), nullptr});
    made->socket.connect({asio::ip::address_v4::loopback(), acceptor_->port()});
    made->socket.non_blocking(true);
    made->tls = tls_->dial(made->socket.native_handle(), key_);
    EXPECT_EQ(made->tls->shake_hands(), asio::error::would_block);
    return made;
  }

  /// Whether `call` returns.
  template <class Call>
  bool returns(Call call) {
    auto done = std::async(std::launch::async, call);
    const bool in_time = done.wait_for(kvferry_test::long_enough) == std::future_status::ready;
    if (!in_time) {
      let_go();
    }
    return in_time;
  }

  /// Whether the slow one's connection ends.
  bool slow_one_is_closed() {
    std::array<std::byte, 4096> said;
    pollfd readable{slow_->socket.native_handle(), POLLIN, 0};
    while (::poll(&readable, 1, wait_ms) == 1) {
      const ssize_t received = ::recv(readable.fd, said.data(), said.size(), MSG_DONTWAIT);
      if (received == 0 || (received < 0 && errno != EAGAIN)) {
        return true;
      }
    }
    return false;
  }

  asio::io_context other_context_;
  const std::shared_ptr<HeldTls> tls_ = std::make_shared<HeldTls>();
  TlsKey key_;
  std::unique_ptr<Newcomer> slow_;
  bool gone_on_ = false;
  std::vector<std::jthread> threads_;
};

TEST_F(DataAcceptorWithASlowNewcomer, OthersAreExpectedAndGetIn) {
  EXPECT_TRUE(returns([this] { (void)expect(std::chrono::hours(1)); }));
  const auto quick = newcomer();
  pollfd readable{quick->socket.native_handle(), POLLIN, 0};
  ASSERT_EQ(::poll(&readable, 1, wait_ms), 1);
  EXPECT_FALSE(quick->tls->shake_hands());
  EXPECT_TRUE(quick->tls->shaken());
}

TEST_F(DataAcceptorWithASlowNewcomer, ClosingDoesNotWaitForIt) {
  EXPECT_TRUE(returns([this] { acceptor_->close(); }));
  let_go();
  EXPECT_TRUE(slow_one_is_closed());
}

TEST_F(DataAcceptorWithASlowNewcomer, WhoMakesRoomMeanwhileIsResetByTheThreadThatIsAtIt) {
  std::vector<tcp::socket> crowd;
  for (int i = 0; i < 64; ++i) {
    crowd.emplace_back(other_context_, tcp::v4()).connect({asio::ip::address_v4::loopback(), acceptor_->port()});
  }
  // The last of the crowd is one too many, and the slow one is the oldest.
  const auto deadline = kit::Clock::now() + kvferry_test::long_enough;
  while (refusals_->snapshot().empty() && kit::Clock::now() < deadline) {
    std::this_thread::yield();
  }
  ASSERT_EQ(refusals_->snapshot().size(), 1U);
  let_go();
  EXPECT_TRUE(slow_one_is_closed());
}

}  // namespace
}  // namespace kvferry::tcp
