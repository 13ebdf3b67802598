// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>

#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/keyring.hpp>
#include <kvferry/tcp_transfer_channel.hpp>
#include <kvferry/testing/traits.hpp>

#include "common/certificates.hpp"

namespace kvferry::inline KVFERRY_ABI::testing {

/// Makes TCP channels whose options `Derived::configure` may change.
template <class Derived>
struct TcpTraits {
  static constexpr bool reconnects = true;
  static constexpr bool notices_blocking_in_handler = true;

  static void configure(TcpOptions&) {}

  std::unique_ptr<BaseTransferChannel> make_channel(ChannelOptions options) {
    return std::make_unique<TcpTransferChannel>(tcp_options(std::move(options)));
  }

  std::unique_ptr<BaseTransferChannel> make_answering_channel(ChannelOptions options, SideMessageAnswer answer) {
    return std::make_unique<AnsweringChannel<TcpTransferChannel>>(std::move(answer), tcp_options(std::move(options)));
  }

 private:
  [[nodiscard]] TcpOptions tcp_options(ChannelOptions options) {
    TcpOptions result;
    static_cast<ChannelOptions&>(result) = std::move(options);
    static_cast<Derived&>(*this).configure(result);
    return result;
  }
};

struct OneLane : TcpTraits<OneLane> {
  static constexpr std::string_view name = "OneLane";
};

struct ThreeLanes : TcpTraits<ThreeLanes> {
  static constexpr std::string_view name = "ThreeLanes";
  static void configure(TcpOptions& options) {
    options.lanes_per_peer = 3;
    options.poll = PollPolicy::never();
    // So that ordinary batches are striped, too.
    options.stripe_threshold = 2048;
    options.checksums = true;
  }
};

/// One key pair for all channels, under any id; the same in each process.
inline void encrypt(TcpOptions& options) {
  const KeyPair pair = key_pair_of(SecretKey(R"(3OUObPtY$7gGY71:lTx@ty-M))?v=*Gq^5=7D=bX)"));
  options.keyring =
      std::make_shared<Keyring>(pair, std::vector<PeerKey>{{std::string(PeerKey::any_id), pair.public_key}});
  options.encryption = Encryption::required;
}

/// One lane that is encrypted by certificates, and checksums on everything.
struct PollingThread : TcpTraits<PollingThread> {
  static constexpr std::string_view name = "PollingThread";
  static void configure(TcpOptions& options) {
    options.poll.spin = std::chrono::microseconds(200);
    options.checksums = true;
    encrypt(options);
    options.certificates = lasting_certificates();
  }
};

/// Encrypted by the key of the handshake, without checksums.
struct TwoIoThreads : TcpTraits<TwoIoThreads> {
  static constexpr std::string_view name = "TwoIoThreads";
  static void configure(TcpOptions& options) {
    encrypt(options);
    options.io_threads = 2;
    options.lanes_per_peer = 2;
    options.stripe_threshold = 2048;
  }
};

/// All of a test's channels run on one executor that the test brings along, with two threads, and have two lanes.
class UserExecutor : public TcpTraits<UserExecutor> {
 public:
  static constexpr std::string_view name = "UserExecutor";

  UserExecutor() : work_(context_.get_executor()) {
    for (int i = 0; i < 2; ++i) {
      threads_.emplace_back([this] { context_.run(); });
    }
  }
  ~UserExecutor() {
    work_.reset();
    for (std::thread& thread : threads_) {
      thread.join();
    }
  }

  void configure(TcpOptions& options) {
    if (!options.executor.has_value()) {
      options.executor = context_.get_executor();
    }
    options.poll = PollPolicy::never();
    options.lanes_per_peer = 2;
    options.stripe_threshold = 2048;
  }

 private:
  asio::io_context context_;
  asio::executor_work_guard<asio::io_context::executor_type> work_;
  std::vector<std::thread> threads_;
};

}  // namespace kvferry::testing
