// SPDX-License-Identifier: Apache-2.0
#include <kvferry/error.hpp>

#include <atomic>
#include <deque>
#include <mutex>
#include <system_error>

#include "channel_settings.hpp"
#include "objects.hpp"
#include "sides.hpp"

namespace bench {
namespace {

using kvferry::MutableBuffer;

/// Receives every n-th batch of a stream, one after the other, until the channel is closed.
class Receiver {
 public:
  Receiver(kvferry::BaseTransferChannel& channel, const StreamObjects<MutableBuffer>& objects, std::size_t stream,
           std::size_t ahead, std::uint64_t first)
      : channel_(channel), objects_(objects), stream_(stream), ahead_(ahead), next_(first) {}

  void post() {
    kvferry::TransferSpec spec;
    spec.peer_id = initiator_id;
    spec.tag = tag_of(stream_, next_, ahead_);
    spec.timeout = std::chrono::hours(1);
    channel_.async_batched_recv(objects_[next_], spec, [this](std::error_code ec, std::size_t) { completed(ec); });
  }

  /// Once the channel is closed.
  [[nodiscard]] std::error_code error() const { return error_; }

 private:
  void completed(std::error_code ec) {
    if (ec) {
      error_ = ec;
      return;
    }
    next_ += ahead_;
    post();
  }

  kvferry::BaseTransferChannel& channel_;
  const StreamObjects<MutableBuffer>& objects_;
  std::size_t stream_;
  std::size_t ahead_;
  std::uint64_t next_;
  std::error_code error_;
};

class TransferTarget final : public Target {
 public:
  explicit TransferTarget(const Setup& setup) : setup_(setup), settings_(setup.job.settings.get<ChannelSettings>()) {
    for (std::size_t peer = 0; peer < setup.job.peers; ++peer) {
      const auto part = setup.region.part(setup.map.pages_per_peer(), peer);
      channels_.push_back(make_channel(settings_, {part.data(), part.size(), setup.job.page}, setup.host));
    }
  }

  [[nodiscard]] Json endpoint() const override {
    Json urls = Json::array();
    for (const auto& channel : channels_) {
      urls.push_back(channel->peer_init_url());
    }
    return urls;
  }

  void connected() override {
    if (setup_.job.operation != "sendrecv") {
      return;
    }
    for (std::size_t stream = 0; stream < setup_.job.streams(); ++stream) {
      const auto& objects = objects_.emplace_back(setup_, stream, true);
      for (std::size_t first = 0; first < settings_.receives_ahead; ++first) {
        receivers_
            .emplace_back(*channels_[setup_.map.peer_of(stream)], objects, stream, settings_.receives_ahead, first)
            .post();
      }
    }
  }

  void finish() override {
    // The bytes of the initiator's operations are here when these have ended. Receives that are posted ahead end with the
    // channels, whose threads run their handlers before the destructors return.
    channels_.clear();
    for (const auto& receiver : receivers_) {
      if (receiver.error() != kvferry::condition::cancelled) {
        throw std::system_error(receiver.error(), "a receive");
      }
    }
  }

 private:
  Setup setup_;
  ChannelSettings settings_;
  std::deque<StreamObjects<MutableBuffer>> objects_;
  std::deque<Receiver> receivers_;
  std::vector<std::unique_ptr<kvferry::BaseTransferChannel>> channels_;
};

}  // namespace

std::unique_ptr<Target> make_transfer_target(const Setup& setup) { return std::make_unique<TransferTarget>(setup); }

}  // namespace bench
