// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <asio/steady_timer.hpp>

#include <kvferry/auto_transfer_channel.hpp>
#include <kvferry/error.hpp>
#include <kvferry/kit/link.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

namespace kvferry::inline KVFERRY_ABI::roads::testing {

/// The state that a test gives a `MortalChannel` from outside.
class Fate {
 public:
  enum class State { alive, dead, unreachable, silent };

  /// From here on no connection is made: the transport knows it (dead), finds it out when it tries (unreachable), or
  /// gets no answer (silent).
  void set(State state) {
    const std::lock_guard lock(mutex_);
    state_ = state;
  }
  [[nodiscard]] State state() {
    const std::lock_guard lock(mutex_);
    return state_;
  }
  /// Breaks all connections as a transport does that notices it.
  void break_links() {
    std::vector<Made> made;
    {
      const std::lock_guard lock(mutex_);
      made.swap(made_);
    }
    for (const auto& [host, weak] : made) {
      if (const auto link = weak.lock()) {
        host->link_failed(*link, errc::connection_lost);
        link->shut(errc::connection_lost, "the road has gone");
      }
    }
  }
  void die() {
    set(State::dead);
    break_links();
  }

  /// An attempt that gets no answer.
  void wait(const asio::any_io_executor& executor, kit::Clock::time_point deadline, kit::LinkHandler on_link) {
    const auto timer = std::make_shared<asio::steady_timer>(executor, deadline);
    const auto cause = std::make_shared<std::atomic<errc>>(errc::timed_out);
    timer->async_wait([timer, cause, on_link = std::move(on_link)](std::error_code) {
      on_link(cause->load(), nullptr, "nobody answered");
    });
    const std::lock_guard lock(mutex_);
    waiting_.push_back({timer, cause});
  }
  /// How many of these there are.
  [[nodiscard]] std::size_t waiting() {
    const std::lock_guard lock(mutex_);
    return waiting_.size();
  }
  /// Ends these, as the end of the channel does.
  void hang_up() { end_waiting(errc::closed); }
  /// Ends these, as the end of their time does.
  void run_out_of_time() { end_waiting(errc::timed_out); }

  /// The error of an attempt while it is unreachable.
  void refuse_with(std::error_code cause) {
    const std::lock_guard lock(mutex_);
    refusal_ = cause;
  }
  [[nodiscard]] std::error_code refusal() {
    const std::lock_guard lock(mutex_);
    return refusal_;
  }

  /// How often a transport was told to connect.
  [[nodiscard]] std::size_t connects() {
    const std::lock_guard lock(mutex_);
    return connects_;
  }
  void count_connect() {
    const std::lock_guard lock(mutex_);
    ++connects_;
  }

  [[nodiscard]] kit::LinkHandler noting(std::shared_ptr<kit::LinkHost> host, kit::LinkHandler on_link) {
    return [this, host = std::move(host), on_link = std::move(on_link)](
               std::error_code ec, std::shared_ptr<kit::Link> link, std::string diagnostic) {
      if (link) {
        const std::lock_guard lock(mutex_);
        std::erase_if(made_, [](const Made& old) { return old.link.expired(); });
        made_.push_back({host, link});
      }
      on_link(ec, std::move(link), std::move(diagnostic));
    };
  }

 private:
  struct Made {
    std::shared_ptr<kit::LinkHost> host;
    std::weak_ptr<kit::Link> link;
  };
  struct Waiting {
    std::weak_ptr<asio::steady_timer> timer;
    std::shared_ptr<std::atomic<errc>> cause;
  };

  void end_waiting(errc cause) {
    const std::lock_guard lock(mutex_);
    for (const Waiting& one : waiting_) {
      if (const auto timer = one.timer.lock()) {
        *one.cause = cause;
        timer->cancel();
      }
    }
    waiting_.clear();
  }

  std::mutex mutex_;
  State state_ = State::alive;
  std::error_code refusal_ = std::make_error_code(std::errc::connection_refused);
  std::size_t connects_ = 0;
  std::vector<Made> made_;
  std::vector<Waiting> waiting_;
};

/// A transport that does as a `Fate` says: a program's own, as a road.
template <class Channel>
class MortalChannel : public Channel {
 public:
  template <class Options>
  MortalChannel(Options options, std::shared_ptr<Fate> fate) : Channel(std::move(options)), fate_(std::move(fate)) {}
  ~MortalChannel() override { this->close(); }

 protected:
  [[nodiscard]] std::unique_ptr<kit::Dial> dial(const std::string& peer_id) override {
    check();
    return std::make_unique<MortalDial>(Channel::dial(peer_id), fate_, this->get_executor());
  }
  [[nodiscard]] Bytes accept(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint,
                             kit::Clock::time_point deadline, kit::LinkHandler on_link) override {
    check();
    auto noting = fate_->noting(host, std::move(on_link));
    return Channel::accept(std::move(host), remote_endpoint, deadline, std::move(noting));
  }
  void stop_listening() override {
    fate_->hang_up();
    Channel::stop_listening();
  }

 private:
  class MortalDial final : public kit::Dial {
   public:
    MortalDial(std::unique_ptr<kit::Dial> dial, std::shared_ptr<Fate> fate, asio::any_io_executor executor)
        : dial_(std::move(dial)), fate_(std::move(fate)), executor_(std::move(executor)) {}

    [[nodiscard]] Bytes local_endpoint() override { return dial_->local_endpoint(); }
    void connect(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint, kit::Clock::time_point deadline,
                 kit::LinkHandler on_link) override {
      fate_->count_connect();
      if (fate_->state() == Fate::State::silent) {
        fate_->wait(executor_, deadline, std::move(on_link));
        return;
      }
      if (fate_->state() != Fate::State::alive) {
        throw TransferError(fate_->refusal(), "nobody is there");
      }
      auto noting = fate_->noting(host, std::move(on_link));
      dial_->connect(std::move(host), remote_endpoint, deadline, std::move(noting));
    }

   private:
    const std::unique_ptr<kit::Dial> dial_;
    const std::shared_ptr<Fate> fate_;
    const asio::any_io_executor executor_;
  };

  void check() const {
    if (fate_->state() == Fate::State::dead) {
      throw TransferError(std::make_error_code(std::errc::network_down), "its port is down");
    }
  }

  const std::shared_ptr<Fate> fate_;
};

/// A road over a transport that does as `fate` says.
template <class Channel, class Options>
[[nodiscard]] AutoRoad mortal_road(std::string name, std::shared_ptr<Fate> fate, bool within_host = false) {
  return {std::move(name),
          [fate = std::move(fate)](ChannelOptions common) {
            Options options;
            static_cast<ChannelOptions&>(options) = std::move(common);
            return std::make_unique<MortalChannel<Channel>>(std::move(options), fate);
          },
          within_host};
}

}  // namespace kvferry::roads::testing
