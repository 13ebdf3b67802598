// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/bind_executor.hpp>
#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/post.hpp>
#include <asio/write.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <future>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp::testing {

/// A network between two channels that a test can stop, cut and count: connections to `port()` are relayed to the target.
class Relay {
 public:
  Relay() : acceptor_(context_, {asio::ip::make_address("127.0.0.1"), 0}), port_(acceptor_.local_endpoint().port()) {
    accept_next();
    thread_ = std::thread([this] { context_.run(); });
  }
  ~Relay() {
    run([this] {
      acceptor_.close();
      close_all();
    });
    work_.reset();
    thread_.join();
  }

  [[nodiscard]] std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  void set_target(std::uint16_t port) {
    run([this, port] { target_ = port; });
  }

  /// Stops reading from either side: bytes pile up in the senders' sockets.
  void pause() {
    run([this] { paused_ = true; });
  }
  /// Likewise, when this many more bytes have come from the target.
  void pause_after(std::size_t bytes) {
    run([this, bytes] { until_pause_ = bytes; });
  }
  void resume() {
    run([this] {
      paused_ = false;
      until_pause_.reset();
      for (const auto& pipe : pipes_) {
        pipe->to_server.kick(*this, pipe);
        pipe->to_client.kick(*this, pipe);
      }
    });
  }
  /// Lets this many more bytes through towards the target, then cuts all connections.
  void cut_after(std::size_t bytes) {
    run([this, bytes] { budget_ = bytes; });
  }
  /// Changes a bit of the byte that comes after this many more, towards the target or from it.
  void flip_after(std::size_t bytes, bool towards_server) {
    run([&] { flip_[towards_server ? 1 : 0] = bytes; });
  }
  /// Keeps what passes from now on.
  void record() {
    run([this] { recording_ = true; });
  }
  /// The bytes of all connections that have passed towards the target, or from it.
  [[nodiscard]] std::string recorded(bool towards_server) {
    std::string bytes;
    run([&] { bytes = recorded_[towards_server ? 1 : 0]; });
    return bytes;
  }
  /// Cuts all connections.
  void cut() {
    run([this] { close_all(); });
  }
  /// Ends the stream towards the connecting side, as an orderly shutdown of the target's side does.
  void half_close() {
    run([this] {
      for (const auto& pipe : pipes_) {
        std::error_code ignored;
        pipe->client.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
      }
    });
  }
  /// Becomes ready when a connecting side has closed its connection.
  [[nodiscard]] std::future<void> client_closed() {
    std::promise<void> promise;
    auto future = promise.get_future();
    run([this, &promise] { client_closed_ = std::move(promise); });
    return future;
  }
  /// Forgets the connections that there are, without a word to either side.
  void swallow() {
    run([this] {
      swallowed_.splice(swallowed_.end(), pipes_);
      for (const auto& pipe : swallowed_) {
        pipe->swallowed = true;
      }
    });
  }

  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }
  [[nodiscard]] int connections() const { return connections_; }

 private:
  struct Pipe;

  struct Direction {
    asio::ip::tcp::socket* from = nullptr;
    asio::ip::tcp::socket* to = nullptr;
    bool towards_server = false;
    bool reading = false;
    std::size_t held = 0;  ///< Read before the relay was paused.
    std::array<char, 65536> buffer{};

    void kick(Relay& relay, const std::shared_ptr<Pipe>& pipe) {
      if (relay.paused_ || pipe->swallowed) {
        return;
      }
      if (held != 0) {
        pass_on(relay, pipe, std::exchange(held, 0));
        return;
      }
      if (reading) {
        return;
      }
      reading = true;
      from->async_read_some(asio::buffer(buffer), [this, &relay, pipe](std::error_code ec, std::size_t count) {
        if (ec) {
          reading = false;
          if (towards_server && relay.client_closed_) {
            relay.client_closed_->set_value();
            relay.client_closed_.reset();
          }
          std::error_code ignored;
          to->shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
          return;
        }
        if (pipe->swallowed) {
          return;
        }
        relay.bytes_ += count;
        if (relay.recording_) {
          relay.recorded_[towards_server ? 1 : 0].append(buffer.data(), count);
        }
        if (auto& flip = relay.flip_[towards_server ? 1 : 0]; flip && *flip < count) {
          buffer[*flip] = static_cast<char>(buffer[*flip] ^ 0x10);
          flip.reset();
        } else if (flip) {
          *flip -= count;
        }
        if (towards_server && relay.budget_ && *relay.budget_ < count) {
          relay.budget_.reset();
          relay.close_all();
          return;
        }
        if (towards_server && relay.budget_) {
          *relay.budget_ -= count;
        }
        if (!towards_server && relay.until_pause_) {
          *relay.until_pause_ -= std::min(*relay.until_pause_, count);
          relay.paused_ = relay.paused_ || *relay.until_pause_ == 0;
        }
        if (relay.paused_) {
          held = count;
        } else {
          pass_on(relay, pipe, count);
        }
      });
    }

    void pass_on(Relay& relay, const std::shared_ptr<Pipe>& pipe, std::size_t count) {
      asio::async_write(*to, asio::buffer(buffer, count), [this, &relay, pipe](std::error_code failed, std::size_t) {
        reading = false;
        if (!failed) {
          kick(relay, pipe);
        }
      });
    }
  };

  struct Pipe {
    explicit Pipe(asio::io_context& context, asio::ip::tcp::socket accepted)
        : client(std::move(accepted)), server(context) {
      to_server.from = &client;
      to_server.to = &server;
      to_server.towards_server = true;
      to_client.from = &server;
      to_client.to = &client;
    }
    asio::ip::tcp::socket client;
    asio::ip::tcp::socket server;
    Direction to_server;
    Direction to_client;
    bool swallowed = false;
  };

  template <class Function>
  void run(Function function) {
    std::promise<void> done;
    asio::post(context_, [&] {
      function();
      done.set_value();
    });
    done.get_future().wait();
  }

  void accept_next() {
    acceptor_.async_accept([this](std::error_code ec, asio::ip::tcp::socket socket) {
      if (ec) {
        return;
      }
      ++connections_;
      const auto pipe = std::make_shared<Pipe>(context_, std::move(socket));
      std::error_code failed;
      pipe->server.connect({asio::ip::make_address("127.0.0.1"), target_}, failed);
      if (!failed) {
        pipes_.push_back(pipe);
        pipe->to_server.kick(*this, pipe);
        pipe->to_client.kick(*this, pipe);
      }
      accept_next();
    });
  }

  void close_all() {
    for (auto* list : {&pipes_, &swallowed_}) {
      for (const auto& pipe : *list) {
        std::error_code ignored;
        pipe->client.close(ignored);
        pipe->server.close(ignored);
      }
      list->clear();
    }
  }

  asio::io_context context_;
  asio::executor_work_guard<asio::io_context::executor_type> work_{context_.get_executor()};
  asio::ip::tcp::acceptor acceptor_;
  const std::uint16_t port_;
  std::uint16_t target_ = 0;
  bool paused_ = false;
  bool recording_ = false;
  std::array<std::string, 2> recorded_;
  std::optional<std::size_t> budget_;
  std::optional<std::size_t> until_pause_;
  std::array<std::optional<std::size_t>, 2> flip_;  ///< Of bytes from the target, and of those towards it.
  std::optional<std::promise<void>> client_closed_;
  std::list<std::shared_ptr<Pipe>> pipes_;
  std::list<std::shared_ptr<Pipe>> swallowed_;
  std::atomic<std::uint64_t> bytes_{0};
  std::atomic<int> connections_{0};
  std::thread thread_;
};

}  // namespace kvferry::tcp::testing
