// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/execution.hpp>
#include <asio/execution_context.hpp>
#include <asio/query.hpp>
#include <asio/use_future.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <future>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/testing/decorated_channel.hpp>

#include "conformance/faults.hpp"

namespace kvferry::inline KVFERRY_ABI::testing {

/// An executor that runs everything at once, where it is; also what is posted, which Asio forbids.
class InlineExecutor {
 public:
  explicit InlineExecutor(asio::execution_context& context) : context_(&context) {}

  template <class Function>
  void execute(Function&& function) const {
    std::decay_t<Function> own(std::forward<Function>(function));
    own();
  }

  [[nodiscard]] asio::execution_context& query(asio::execution::context_t) const noexcept { return *context_; }
  [[nodiscard]] static constexpr asio::execution::blocking_t query(asio::execution::blocking_t) noexcept {
    return asio::execution::blocking.never;
  }
  [[nodiscard]] const InlineExecutor& require(asio::execution::blocking_t::never_t) const noexcept { return *this; }

  friend bool operator==(const InlineExecutor& a, const InlineExecutor& b) noexcept { return a.context_ == b.context_; }
  friend bool operator!=(const InlineExecutor& a, const InlineExecutor& b) noexcept { return !(a == b); }

 private:
  asio::execution_context* context_;
};

/// A channel with one fault, and otherwise as good as the one in it.
class BrokenChannel final : public DecoratedChannel {
 public:
  BrokenChannel(std::unique_ptr<BaseTransferChannel> inner_channel, Fault fault)
      : DecoratedChannel(std::move(inner_channel)), fault_(fault) {}

  ~BrokenChannel() override {
    if (fault_ == Fault::late_read && threads_.empty()) {
      let_peers_scribble();
    }
    done_ = true;
    for (std::thread& thread : threads_) {
      thread.join();
    }
  }

  [[nodiscard]] asio::any_io_executor get_executor() const override {
    const auto executor = DecoratedChannel::get_executor();
    return fault_ == Fault::inline_handler
               ? asio::any_io_executor(InlineExecutor(asio::query(executor, asio::execution::context)))
               : executor;
  }

  [[nodiscard]] Capabilities capabilities() const noexcept override {
    return fault_ == Fault::incapable ? Capabilities{} : DecoratedChannel::capabilities();
  }

  void close() override {
    if (fault_ == Fault::deaf_to_close) {
      return;
    }
    if (fault_ == Fault::hanging_close) {
      std::promise<void>().get_future().wait_until(std::chrono::steady_clock::time_point::max());
    }
    release_held();
    DecoratedChannel::close();
  }

 protected:
  void start_fence(std::string peer_id, std::optional<std::chrono::milliseconds> timeout,
                   FenceCompletion completion) override {
    if (fault_ == Fault::hollow_fence && !peer_id.empty()) {
      completion({});
      return;
    }
    DecoratedChannel::start_fence(std::move(peer_id), timeout, std::move(completion));
  }

  void start_disconnect(std::string peer_id, DisconnectCompletion completion) override {
    if (fault_ == Fault::silent_disconnect) {
      completion({});
      return;
    }
    DecoratedChannel::start_disconnect(std::move(peer_id), std::move(completion));
  }

  void start_remove_region(std::uint32_t number, std::optional<std::chrono::milliseconds> timeout,
                           RemoveRegionCompletion completion) override {
    if (fault_ == Fault::hasty_removal) {
      inner().async_remove_region(number, timeout, [](std::error_code) {});
      completion({});
      return;
    }
    DecoratedChannel::start_remove_region(number, timeout, std::move(completion));
  }

  void start_wait_peer_event(std::optional<std::chrono::milliseconds> timeout,
                             PeerEventCompletion completion) override {
    if (fault_ != Fault::deaf_to_peers) {
      DecoratedChannel::start_wait_peer_event(timeout, std::move(completion));
      return;
    }
    inner().async_wait_peer_event(
        timeout, [this, timeout, completion = std::move(completion)](std::error_code ec, PeerEvent event) mutable {
          if (!ec && event.kind == PeerEventKind::gone) {
            start_wait_peer_event(timeout, std::move(completion));
          } else {
            completion(ec, std::move(event));
          }
        });
  }

  void start_connect(ConnectRequest request, ConnectCompletion completion) override {
    if (fault_ != Fault::any_incarnation) {
      DecoratedChannel::start_connect(std::move(request), std::move(completion));
      return;
    }
    inner().async_connect(request.local_id, request.metadata, {request.timeout, request.diagnostic},
                          [completion = std::move(completion)](std::error_code ec, PeerInfo info) mutable {
                            completion(ec == errc::peer_restarted ? std::error_code() : ec, std::move(info));
                          });
  }

  void start_transfer(TransferRequest request, Completion completion) override {
    if (fault_ == Fault::late_notification || fault_ == Fault::unsaid_doubt) {
      release_late();
    }
    release_held();
    switch (fault_) {
      case Fault::double_completion: complete_twice(std::move(request), std::move(completion)); break;
      case Fault::lost_completion:
      case Fault::stuck_completion: lose_some(std::move(request), std::move(completion)); break;
      case Fault::inline_handler: complete_inline(std::move(request), std::move(completion)); break;
      case Fault::early_release: release_early(std::move(request), std::move(completion)); break;
      case Fault::early_notification: notify_early(std::move(request), std::move(completion)); break;
      case Fault::wrong_byte: change_a_byte(std::move(request), std::move(completion)); break;
      case Fault::wrong_count: miscount(std::move(request), std::move(completion)); break;
      case Fault::whole_pages: widen(std::move(request), std::move(completion)); break;
      case Fault::late_read: read_late(std::move(request), std::move(completion)); break;
      case Fault::fills_gaps: fill_a_gap(std::move(request), std::move(completion)); break;
      case Fault::lost_answer: lose_answer(std::move(request), std::move(completion)); break;
      case Fault::late_write:
      case Fault::unsaid_doubt:
      case Fault::late_notification: repeat_late(std::move(request), std::move(completion)); break;
      case Fault::first_object_wins: reverse(std::move(request), std::move(completion)); break;
      case Fault::deaf_to_cancel: transfer_then(std::move(request), std::move(completion), complete); break;
      case Fault::no_statuses:
        request.statuses = {};
        DecoratedChannel::start_transfer(std::move(request), std::move(completion));
        break;
      case Fault::endless:
        request.timeout = std::chrono::hours(1);
        DecoratedChannel::start_transfer(std::move(request), std::move(completion));
        break;
      case Fault::keyless:
        request.notification_key = 0;
        DecoratedChannel::start_transfer(std::move(request), std::move(completion));
        break;
      case Fault::none:
      case Fault::deaf_to_peers:
      case Fault::silent_disconnect:
      case Fault::any_incarnation:
      case Fault::hasty_removal:
      case Fault::deaf_to_close:
      case Fault::hanging_close:
      case Fault::hollow_fence:
      case Fault::incapable: DecoratedChannel::start_transfer(std::move(request), std::move(completion)); break;
    }
  }

 private:
  struct Held {
    TransferRequest request;
    Completion completion;  ///< Empty: it has been called already.
  };

  static void complete(Completion& completion, std::error_code error, std::size_t count) { completion(error, count); }

  /// Does the transfer and has `finish` call the completion.
  template <class Finish>
  void transfer_then(TransferRequest request, Completion completion, Finish finish) {
    inner().async_transfer(std::move(request),
                           [completion = std::move(completion), finish = std::move(finish)](
                               std::error_code error, std::size_t count) mutable { finish(completion, error, count); });
  }

  void complete_twice(TransferRequest request, Completion completion) {
    transfer_then(std::move(request), std::move(completion),
                  [](Completion& end, std::error_code error, std::size_t count) {
                    end(error, count);
                    end(error, count);
                  });
  }

  void miscount(TransferRequest request, Completion completion) {
    transfer_then(
        std::move(request), std::move(completion),
        [](Completion& end, std::error_code error, std::size_t count) { end(error, count == 0 ? 0 : count - 1); });
  }

  void lose_some(TransferRequest request, Completion completion) {
    const std::unique_lock lock(mutex_);
    if (++started_ % 3 != 0) {
      DecoratedChannel::start_transfer(std::move(request), std::move(completion));
      return;
    }
    inner().async_transfer(std::move(request), [](std::error_code, std::size_t) {});
    if (fault_ == Fault::stuck_completion) {
      kept_.push_back(std::move(completion));
    }
  }

  void complete_inline(TransferRequest request, Completion completion) {
    auto result = inner().async_transfer(std::move(request), asio::use_future);
    try {
      const std::size_t count = result.get();
      completion({}, count);
    } catch (const std::system_error& error) {
      completion(error.code(), 0);
    }
  }

  /// Says "done", and does it only with the next operation.
  void release_early(TransferRequest request, Completion completion) {
    if (request.kind != TransferKind::write || request.objects.empty()) {
      DecoratedChannel::start_transfer(std::move(request), std::move(completion));
      return;
    }
    const std::size_t count = request.objects.size();
    std::fill(request.statuses.begin(), request.statuses.end(), std::error_code());
    request.statuses = {};
    request.diagnostic = nullptr;
    hold(std::move(request), {});
    completion({}, count);
  }

  /// Sends the notification behind nothing, and the write with the next operation.
  void notify_early(TransferRequest request, Completion completion) {
    if (request.notification.empty() || request.objects.empty()) {
      DecoratedChannel::start_transfer(std::move(request), std::move(completion));
      return;
    }
    TransferRequest alone = request;
    alone.objects.assign(1, MutableBuffer());
    alone.remote_indexes.resize(1);
    alone.statuses = {};
    alone.diagnostic = nullptr;
    request.notification.clear();
    hold(std::move(request), std::move(completion));
    inner().async_transfer(std::move(alone), [](std::error_code, std::size_t) {});
  }

  void hold(TransferRequest request, Completion completion) {
    const std::lock_guard lock(mutex_);
    held_.push_back({std::move(request), std::move(completion)});
  }

  void release_held() {
    std::vector<Held> held;
    {
      const std::lock_guard lock(mutex_);
      held.swap(held_);
    }
    for (Held& late : held) {
      transfer_then(std::move(late.request), std::move(late.completion),
                    [](Completion& end, std::error_code error, std::size_t count) {
                      if (end) {
                        end(error, count);
                      }
                    });
    }
  }

  /// Ends what was given up as it should, and keeps it to do it again after the next write has succeeded.
  void repeat_late(TransferRequest request, Completion completion) {
    if (request.kind != TransferKind::write || request.objects.empty()) {
      DecoratedChannel::start_transfer(std::move(request), std::move(completion));
      return;
    }
    auto again = std::make_shared<TransferRequest>(request);
    again->statuses = {};
    again->diagnostic = nullptr;
    again->timeout.reset();
    if (fault_ == Fault::late_notification) {
      again->objects.assign(1, MutableBuffer());
      again->remote_indexes.resize(1);
    }
    transfer_then(std::move(request), std::move(completion),
                  [this, again](Completion& end, std::error_code error, std::size_t count) {
                    if (error) {
                      const std::lock_guard lock(mutex_);
                      late_.push_back(std::move(*again));
                    } else {
                      release_late();
                    }
                    end(fault_ == Fault::late_write ? error : without_doubt(error), count);
                  });
  }

  void release_late() {
    std::vector<TransferRequest> late;
    {
      const std::lock_guard lock(mutex_);
      late.swap(late_);
    }
    for (TransferRequest& request : late) {
      inner().async_transfer(std::move(request), [](std::error_code, std::size_t) {});
    }
  }

  [[nodiscard]] static std::error_code without_doubt(std::error_code error) {
    return error == errc::timed_out_in_flight   ? errc::timed_out
           : error == errc::closed_in_flight    ? errc::closed
           : error == errc::cancelled_in_flight ? errc::cancelled
           : error == condition::may_still_land ? std::make_error_code(std::errc::timed_out)
                                                : error;
  }

  /// Goes on writing into the buffers of what was given up, until it is closed.
  void read_late(TransferRequest request, Completion completion) {
    if (request.kind != TransferKind::read) {
      DecoratedChannel::start_transfer(std::move(request), std::move(completion));
      return;
    }
    const std::vector<MutableBuffer> buffers = request.objects;
    transfer_then(std::move(request), std::move(completion),
                  [this, buffers](Completion& end, std::error_code error, std::size_t count) {
                    if (error && !buffers.empty()) {
                      const std::lock_guard lock(mutex_);
                      scribbled_.push_back(buffers.front());
                      if (threads_.empty()) {
                        ++scribbling_;
                        threads_.emplace_back([this] { scribble(); });
                      }
                    }
                    end(error, count);
                  });
  }

  void scribble() {
    while (!done_) {
      {
        const std::lock_guard lock(mutex_);
        for (const MutableBuffer buffer : scribbled_) {
          std::ranges::fill(buffer, std::byte{0xee});
        }
      }
      ++scribbled_rounds_;
      std::this_thread::yield();
    }
    --scribbling_;
  }

  /// Before this channel is gone they have written to those buffers once more, however busy the machine is.
  static void let_peers_scribble() {
    const std::size_t enough = scribbled_rounds_ + 2;  // the one under way may be behind them already
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    while (scribbling_ != 0 && scribbled_rounds_ < enough && std::chrono::steady_clock::now() < until) {
      std::this_thread::yield();
    }
  }

  /// Where the peer closes upon its notification, the answer to that write is lost with the connection.
  void lose_answer(TransferRequest request, Completion completion) {
    if (request.notification.empty()) {
      DecoratedChannel::start_transfer(std::move(request), std::move(completion));
      return;
    }
    const std::string peer = request.peer_id;
    transfer_then(std::move(request), std::move(completion),
                  [this, peer](Completion& end, std::error_code error, std::size_t count) {
                    const std::lock_guard lock(mutex_);
                    threads_.emplace_back([this, peer, error, count, waiting = std::move(end)]() mutable {
                      const bool lost = !error && closes(peer);
                      waiting(lost ? make_error_code(errc::peer_closed) : error, lost ? 0 : count);
                    });
                  });
  }

  /// Whether the peer goes within a second.
  [[nodiscard]] bool closes(const std::string& peer) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(1);
    while (inner().remote_xfer_handler_exists(peer)) {
      if (std::chrono::steady_clock::now() > until) {
        return false;
      }
      std::this_thread::yield();
    }
    return true;
  }

  void reverse(TransferRequest request, Completion completion) {
    std::reverse(request.objects.begin(), request.objects.end());
    std::reverse(request.remote_indexes.begin(), request.remote_indexes.end());
    std::reverse(request.remote_ranges.begin(), request.remote_ranges.end());
    DecoratedChannel::start_transfer(std::move(request), std::move(completion));
  }

  /// The last byte of the last object that has one: of a copy before it goes out, of the buffer after it has come in.
  void change_a_byte(TransferRequest request, Completion completion) {
    const auto last = std::find_if(request.objects.rbegin(), request.objects.rend(),
                                   [](MutableBuffer object) { return !object.empty(); });
    if (last == request.objects.rend()) {
      DecoratedChannel::start_transfer(std::move(request), std::move(completion));
      return;
    }
    if (request.kind == TransferKind::write || request.kind == TransferKind::send) {
      const auto copy = std::make_shared<std::vector<std::byte>>(last->begin(), last->end());
      copy->back() ^= std::byte{1};
      *last = MutableBuffer(*copy);
      transfer_then(std::move(request), std::move(completion),
                    [copy](Completion& end, std::error_code error, std::size_t count) { end(error, count); });
      return;
    }
    const MutableBuffer incoming = *last;
    transfer_then(std::move(request), std::move(completion),
                  [incoming](Completion& end, std::error_code error, std::size_t count) {
                    incoming.back() ^= std::byte{2};
                    end(error, count);
                  });
  }

  void fill_a_gap(TransferRequest request, Completion completion) {
    std::byte* gap = nullptr;
    for (std::size_t i = 0; i < request.local_strides.size() && request.kind == TransferKind::read; ++i) {
      const LocalStride& stride = request.local_strides[i];
      if (stride.block_size < stride.stride && stride.block_size < request.objects[i].size()) {
        gap = request.objects[i].data() + stride.block_size;
      }
    }
    transfer_then(std::move(request), std::move(completion),
                  [gap](Completion& end, std::error_code error, std::size_t count) {
                    if (gap != nullptr) {
                      *gap ^= std::byte{1};
                    }
                    end(error, count);
                  });
  }

  /// Makes every object of a write as large as a page.
  void widen(TransferRequest request, Completion completion) {
    const auto info = inner().peer_info(request.peer_id);
    const auto wide = std::make_shared<std::list<std::vector<std::byte>>>();
    for (MutableBuffer& object : request.objects) {
      if (info && request.kind == TransferKind::write) {
        auto& copy = wide->emplace_back(info->regions.at(request.remote_region).page_size);
        std::copy_n(object.begin(), std::min(object.size(), copy.size()), copy.begin());
        object = copy;
      }
    }
    transfer_then(std::move(request), std::move(completion),
                  [wide](Completion& end, std::error_code error, std::size_t count) { end(error, count); });
  }

  static inline std::atomic<int> scribbling_{0};  ///< The threads that do it, of all channels.
  static inline std::atomic<std::size_t> scribbled_rounds_{0};

  const Fault fault_;
  std::mutex mutex_;
  std::size_t started_ = 0;
  std::vector<Completion> kept_;
  std::vector<Held> held_;
  std::vector<TransferRequest> late_;
  std::vector<MutableBuffer> scribbled_;
  std::vector<std::thread> threads_;
  std::atomic<bool> done_{false};
};

}  // namespace kvferry::testing
