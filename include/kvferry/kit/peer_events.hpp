// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_PEER_EVENTS_HPP
#define KVFERRY_KIT_PEER_EVENTS_HPP

#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <utility>

#include <kvferry/peer_event.hpp>

#include <kvferry/kit/wait_queue.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Events of peers that no call has taken yet. Where too much waits, the oldest is dropped, and the one behind it says
/// so.
class PeerEvents final : public WaitQueue<PeerEvent> {
 public:
  /// @param most that wait; at least one does.
  PeerEvents(std::shared_ptr<DeadlineQueue> deadlines, std::size_t most)
      : WaitQueue(std::move(deadlines)), most_(most == 0 ? 1 : most) {}

  void push(PeerEvent event) { (void)push_item(0, std::move(event)); }
  void receive(std::optional<std::chrono::milliseconds> timeout, PeerEventCompletion completion) {
    WaitQueue::receive(0, 1, timeout, for_one<PeerEvent>(std::move(completion)));
  }

 private:
  [[nodiscard]] bool keep(PeerEvent& event) override {
    if (count() == most_) {
      const std::uint64_t missed = oldest(0)->missed + 1;
      drop_oldest(0);
      PeerEvent* const next = oldest(0);
      (next == nullptr ? event : *next).missed += missed;
    }
    return true;
  }
  void let_go(const PeerEvent&) override {}

  const std::size_t most_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_PEER_EVENTS_HPP
