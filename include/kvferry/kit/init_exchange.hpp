// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_INIT_EXCHANGE_HPP
#define KVFERRY_KIT_INIT_EXCHANGE_HPP

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>

#include <kvferry/base_transfer_channel.hpp>

#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/operation_registry.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

class InitExchanges;

/// One call of `lazy_init_peer_connection` or `send_init_side_msg` on its way; ends exactly once.
class InitExchange final : public Expirable, public std::enable_shared_from_this<InitExchange> {
 public:
  InitExchange(InitRequest request, SideMessageCompletion completion, Clock::time_point deadline,
               std::shared_ptr<InitExchanges> owner)
      : request_(std::move(request)),
        completion_(std::move(completion)),
        deadline_(deadline),
        owner_(std::move(owner)) {}

  [[nodiscard]] const InitRequest& request() const noexcept { return request_; }
  [[nodiscard]] Clock::time_point deadline() const noexcept { return deadline_; }
  [[nodiscard]] bool ended() const noexcept { return ended_; }

  void finish(const Failure& failure, std::optional<SideMessage> answer = {});
  void accept_cancellation();
  void expire() override;

 private:
  /// Its caller doesn't wait any longer.
  void stop(const Failure& failure);
  void finish(const Failure& failure, std::optional<SideMessage> answer, bool stopped);

  const InitRequest request_;
  SideMessageCompletion completion_;
  const Clock::time_point deadline_;
  const std::shared_ptr<InitExchanges> owner_;
  std::atomic<bool> ended_{false};
};

/// The exchanges of a channel that have not ended yet.
class InitExchanges : public std::enable_shared_from_this<InitExchanges> {
 public:
  explicit InitExchanges(std::shared_ptr<DeadlineQueue> deadlines) : deadlines_(std::move(deadlines)) {}

  /// @return nothing if the channel is closed or memory is used up, with the completion called.
  [[nodiscard]] std::shared_ptr<InitExchange> begin(InitRequest request, SideMessageCompletion completion,
                                                    Clock::time_point deadline);
  void remove(const InitExchange& exchange);
  void close();
  /// To be set before there are exchanges.
  void set_awaited(AwaitedOfPeer describe) { awaited_of_peer_ = std::move(describe); }
  /// Likewise.
  void set_stopped_waiting(StoppedWaiting tell) { stopped_waiting_ = std::move(tell); }
  void stopped_waiting(std::string_view peer_id) const {
    if (stopped_waiting_) {
      stopped_waiting_(peer_id);
    }
  }
  [[nodiscard]] std::string awaited(std::string_view peer_id) const {
    return awaited_of_peer_ ? awaited_of_peer_(peer_id) : std::string();
  }
  [[nodiscard]] const std::shared_ptr<Gate>& gate() const noexcept { return deadlines_->gate(); }

 private:
  const std::shared_ptr<DeadlineQueue> deadlines_;
  AwaitedOfPeer awaited_of_peer_;
  StoppedWaiting stopped_waiting_;
  std::mutex mutex_;
  std::unordered_map<const InitExchange*, std::shared_ptr<InitExchange>> pending_;
  bool closed_ = false;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_INIT_EXCHANGE_HPP
