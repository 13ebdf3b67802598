// SPDX-License-Identifier: Apache-2.0
#include <kvferry/error.hpp>

#include <asio/any_io_executor.hpp>
#include <asio/bind_executor.hpp>
#include <asio/io_context.hpp>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "channel_settings.hpp"
#include "objects.hpp"
#include "sides.hpp"

namespace bench {
namespace {

using kvferry::MutableBuffer;

/// Starts or makes a stream's transfers: the user's code, so to speak.
class StreamTransfers {
 public:
  StreamTransfers(const Setup& setup, kvferry::BaseTransferChannel& channel, std::size_t stream)
      : operation_(setup.job.operation),
        map_(setup.map),
        channel_(channel),
        stream_(stream),
        peer_(peer_id(setup.map.peer_of(stream))),
        receives_ahead_(setup.job.settings.get<ChannelSettings>().receives_ahead),
        objects_(setup, stream, false) {}

  /// Returns when the batch is moved.
  void move(std::uint64_t batch) {
    const auto spec = spec_of(batch);
    if (operation_ == "read") {
      channel_.batched_read(objects_[batch], spec);
    } else if (operation_ == "sendrecv") {
      channel_.batched_send(objects_[batch], spec);
    } else {
      channel_.batched_write(objects_[batch], spec);
    }
  }

  template <class Handler>
  void start(std::uint64_t batch, Handler handler) {
    auto spec = spec_of(batch);
    diagnostic_.clear();
    spec.diagnostic = &diagnostic_;
    if (operation_ == "read") {
      channel_.async_batched_read(objects_[batch], spec, std::move(handler));
    } else if (operation_ == "sendrecv") {
      channel_.async_batched_send(objects_[batch], spec, std::move(handler));
    } else {
      channel_.async_batched_write(objects_[batch], spec, std::move(handler));
    }
  }

  /// Why the transfer failed that `start` started last.
  [[nodiscard]] const std::string& diagnostic() const { return diagnostic_; }

 private:
  [[nodiscard]] kvferry::TransferSpec spec_of(std::uint64_t batch) const {
    kvferry::TransferSpec spec;
    spec.peer_id = peer_;
    if (operation_ == "sendrecv") {
      spec.tag = tag_of(stream_, batch, receives_ahead_);
    } else {
      spec.remote_indexes = map_.target_pages(stream_, batch);
    }
    return spec;
  }

  const std::string& operation_;
  const PageMap& map_;
  kvferry::BaseTransferChannel& channel_;
  std::size_t stream_;
  std::string peer_;
  std::size_t receives_ahead_;
  /// Only read here, except by a read.
  StreamObjects<MutableBuffer> objects_;
  std::string diagnostic_;
};

/// Waits until so many have ended.
class Countdown {
 public:
  void reset(std::size_t count) { left_ = count; }
  void count_down() {
    const std::lock_guard lock(mutex_);
    if (--left_ == 0) {
      ended_.notify_all();
    }
  }
  void wait() {
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [this] { return left_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  std::size_t left_ = 0;
};

/// One transfer after the other for one stream, each started by the handler of the one before.
class AsyncStream {
 public:
  AsyncStream(StreamTransfers& transfers, Stream& stream, asio::any_io_executor executor, Countdown& ended)
      : transfers_(transfers), stream_(stream), executor_(std::move(executor)), ended_(ended) {}

  void begin() {
    bool started = false;
    {
      const std::lock_guard lock(mutex_);
      started = start_next(Clock::now());
    }
    if (!started) {
      ended_.count_down();
    }
  }

  /// Once it has ended. @throws what the transfer that failed failed with.
  void check() const {
    if (error_) {
      throw std::runtime_error(transfers_.diagnostic().empty() ? error_.message() : transfers_.diagnostic());
    }
  }

 private:
  bool start_next(Clock::time_point now) {
    const auto batch = stream_.next(now);
    if (!batch) {
      return false;
    }
    started_ = now;
    transfers_.start(*batch,
                     asio::bind_executor(executor_, [this](std::error_code ec, std::size_t) { completed(ec); }));
    stream_.submitted(Clock::now() - now);
    return true;
  }

  void completed(std::error_code ec) {
    bool started = false;
    {
      // The call that started the transfer may not have returned yet, on another thread.
      const std::lock_guard lock(mutex_);
      const auto now = Clock::now();
      stream_.completed(started_, now);
      error_ = ec;
      started = !ec && start_next(now);
    }
    if (!started) {
      ended_.count_down();
    }
  }

  StreamTransfers& transfers_;
  Stream& stream_;
  asio::any_io_executor executor_;
  Countdown& ended_;
  std::mutex mutex_;
  Clock::time_point started_;
  std::error_code error_;
};

kvferry::MemoryRegion offered_region(const Setup& setup) {
  if (setup.job.settings.get<ChannelSettings>().unregistered) {
    return {};
  }
  return {setup.region.data(), setup.region.size(), setup.job.page};
}

class TransferInitiator final : public Initiator {
 public:
  TransferInitiator(const Setup& setup, const Json& endpoint)
      : settings_(setup.job.settings.get<ChannelSettings>()),
        threads_(setup.job.threads),
        channel_(make_channel(settings_, offered_region(setup), {})) {
    for (std::size_t peer = 0; peer < setup.job.peers; ++peer) {
      channel_->lazy_init_peer_connection(initiator_id, peer_id(peer), endpoint.at(peer).get<std::string>());
    }
    for (std::size_t stream = 0; stream < setup.job.streams(); ++stream) {
      transfers_.emplace_back(setup, *channel_, stream);
    }
  }

  void run(std::span<Stream> streams) override {
    if (settings_.async) {
      run_async(streams);
    } else {
      run_blocking(streams, [this](std::size_t stream, std::uint64_t batch) { transfers_[stream].move(batch); });
    }
  }

  [[nodiscard]] std::string path() const override {
    return channel_->peer_info(peer_id(0)).value_or(kvferry::PeerInfo{}).path;
  }
  [[nodiscard]] std::optional<Window> window() const override { return window_of(*channel_); }

 private:
  void run_async(std::span<Stream> streams) {
    std::vector<asio::io_context> contexts(threads_);
    std::deque<AsyncStream> runs;
    ended_.reset(streams.size());
    for (std::size_t i = 0; i < streams.size(); ++i) {
      runs.emplace_back(transfers_[i], streams[i],
                        threads_ == 0 ? channel_->get_executor() : contexts[i % threads_].get_executor(), ended_);
    }
    if (threads_ == 0) {
      std::ranges::for_each(runs, &AsyncStream::begin);
      ended_.wait();
    } else {
      // A context's `run` returns when none of its transfers is pending.
      run_in_threads(threads_, [&](std::size_t thread) {
        for (std::size_t i = thread; i < runs.size(); i += threads_) {
          runs[i].begin();
        }
        contexts[thread].run();
      });
    }
    std::ranges::for_each(runs, &AsyncStream::check);
  }

  ChannelSettings settings_;
  std::size_t threads_;
  Countdown ended_;
  /// Before the channel, which ends all that they have started.
  std::deque<StreamTransfers> transfers_;
  std::unique_ptr<kvferry::BaseTransferChannel> channel_;
};

}  // namespace

std::unique_ptr<Initiator> make_transfer_initiator(const Setup& setup, const Json& endpoint) {
  return std::make_unique<TransferInitiator>(setup, endpoint);
}

}  // namespace bench
