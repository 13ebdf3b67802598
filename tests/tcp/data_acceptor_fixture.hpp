// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <asio/buffer.hpp>
#include <asio/error.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/read.hpp>

#include <poll.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/tcp/data_acceptor.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp::testing {

/// For whom a handshake's connections are awaited.
class AwaitingHost final : public kit::LinkHost {
 public:
  AwaitingHost() { peer_.id = "peer"; }
  [[nodiscard]] const kit::PeerDescription& peer() const noexcept override { return peer_; }
  [[nodiscard]] std::shared_ptr<const kit::RegionList> local_regions() const override {
    return kit::RegionList::of({});
  }
  [[nodiscard]] bool deliver_notification(std::vector<std::byte>, std::uint64_t) override { return false; }
  void when_abandoned(std::function<void()> drop) override { abandon = std::move(drop); }
  void link_failed(const kit::Link&, std::error_code) override {}

  std::function<void()> abandon;

 private:
  kit::PeerDescription peer_;
};

class DataAcceptorTest : public ::testing::Test {
 protected:
  explicit DataAcceptorTest(std::chrono::milliseconds hello_timeout = std::chrono::hours(1)) {
    LinkOptions options;
    options.hello_timeout = hello_timeout;
    acceptor_ = std::make_shared<DataAcceptor>(context_.get_executor(), options, refusals_);
  }
  ~DataAcceptorTest() override {
    acceptor_->close();
    acceptor_.reset();
    context_.run();
  }

  AcceptEndpoint expect(std::chrono::milliseconds timeout) {
    return acceptor_->expect(host_, 2, kit::Clock::now() + timeout,
                             [this](std::error_code ec, const std::shared_ptr<kit::Link>&, std::string diagnostic) {
                               ended_.push_back(ec);
                               diagnostic_ = std::move(diagnostic);
                             });
  }

  /// With which the handshake's connections are encrypted.
  static TlsKey key_of(const AcceptEndpoint& endpoint) {
    TlsKey key;
    std::ranges::copy(endpoint.tls_identity.value(), key.identity.begin());
    std::ranges::copy(endpoint.tls_secret.value(), key.secret.begin());
    return key;
  }

  /// A connection that has been accepted, and says nothing.
  asio::ip::tcp::socket stranger(const char* source = "127.0.0.1") {
    asio::ip::tcp::socket socket(context_, asio::ip::tcp::v4());
    socket.bind({asio::ip::make_address(source), 0});
    socket.connect({asio::ip::address_v4::loopback(), acceptor_->port()});
    socket.non_blocking(true);
    // The kernel has it in the acceptor's queue by now, or will at once.
    context_.run_one();
    context_.poll();
    return socket;
  }

  /// Whether it has been closed; `said` is what came before.
  static bool is_closed(asio::ip::tcp::socket& socket, std::vector<std::byte>& said) {
    said.resize(sizeof(Hello) + 1);
    std::error_code ec;
    said.resize(asio::read(socket, asio::buffer(said), ec));
    return ec != asio::error::would_block;
  }
  /// Likewise, where it has to be: the kernel may deliver that a little later.
  static bool comes_to_be_closed(asio::ip::tcp::socket& socket, std::vector<std::byte>& said) {
    said.resize(sizeof(Hello) + 1);
    std::size_t come = 0;
    pollfd readable{socket.native_handle(), POLLIN, 0};
    while (::poll(&readable, 1, 30'000) == 1) {
      std::error_code ec;
      come += asio::read(socket, asio::buffer(said.data() + come, said.size() - come), ec);
      if (ec != asio::error::would_block) {
        said.resize(come);
        return true;
      }
    }
    return false;
  }

  asio::io_context context_;
  std::shared_ptr<kit::Refusals> refusals_ = std::make_shared<kit::Refusals>(std::make_shared<kit::Logger>());
  std::shared_ptr<AwaitingHost> host_ = std::make_shared<AwaitingHost>();
  std::shared_ptr<DataAcceptor> acceptor_;
  std::vector<std::error_code> ended_;
  std::string diagnostic_;
};

}  // namespace kvferry::tcp::testing
