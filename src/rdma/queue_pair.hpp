// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <system_error>
#include <vector>

#include <kvferry/kit/failure.hpp>
#include "device_limits.hpp"
#include "endpoint.hpp"
#include "rail_domain.hpp"
#include "rail_protocol.hpp"
#include "verbs.hpp"
#include "work_list.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

struct QueuePairOptions {
  std::size_t queue_depth = 0;
  std::size_t read_depth = 0;
  std::size_t eager_bytes = 0;
  std::uint8_t timeout_exponent = 0;
  std::uint8_t retry_count = 0;
  std::uint8_t service_level = 0;
  std::uint8_t traffic_class = 0;
};

/// A reliable connection: a queue pair, its own completion queue, the channel that announces completions, and the
/// memory for messages. One thread at a time.
class QueuePair {
 public:
  /// Creates the queue pair and posts all receive buffers. @throws TransferError naming the device and the failure.
  QueuePair(std::shared_ptr<RailDomain> domain, std::size_t rail, const QueuePairOptions& options);
  QueuePair(const QueuePair&) = delete;
  QueuePair& operator=(const QueuePair&) = delete;

  [[nodiscard]] const RailEndpoint& endpoint() const noexcept { return endpoint_; }

  /// Joins it with the peer's.
  [[nodiscard]] kit::Failure connect(const Endpoint& peer, const RailEndpoint& peers_rail);
  /// The agreed limits, after `connect`.
  [[nodiscard]] const RailTerms& terms() const noexcept { return terms_; }
  /// The first places to send messages from, of the agreed size.
  [[nodiscard]] MessageSlots slots() const noexcept;
  /// Makes as many places more, up to so many in all. @throws std::system_error
  [[nodiscard]] MessageSlots double_slots(std::size_t most);
  /// Makes as many receive buffers more, up to so many in all, and posts them. @throws std::system_error if there is no memory for
  /// them. @return how many there are.
  [[nodiscard]] std::size_t double_buffers(std::size_t most, std::error_code& failure);

  /// Posts a list. If it fails, some of it may have been posted.
  /// @param refused if it fails, the `wr_id` of the request that wasn't taken.
  [[nodiscard]] std::error_code post(WorkList& list, std::uint64_t* refused = nullptr);
  /// @return how many completions there were; negative if the queue is broken.
  [[nodiscard]] int poll(std::span<ibv_wc> completions);
  /// How many there can be at a time.
  [[nodiscard]] std::size_t most_completions() const noexcept { return static_cast<std::size_t>(completions_->cqe); }

  [[nodiscard]] static bool is_receive(const ibv_wc& completion) noexcept {
    return (completion.wr_id & receive_flag) != 0;
  }
  /// Whether it is of a message. A write with immediate data takes a receive buffer too, and leaves in it what was there.
  [[nodiscard]] static bool is_message(const ibv_wc& completion) noexcept { return completion.opcode == IBV_WC_RECV; }
  /// A received message.
  [[nodiscard]] std::span<const std::byte> message(const ibv_wc& completion) const noexcept;
  /// Posts the receive buffers of these completions anew.
  [[nodiscard]] std::error_code post_receives(std::span<const ibv_wc> completions);

  [[nodiscard]] const ibv_qp* pair() const noexcept { return pair_.get(); }
  [[nodiscard]] const ibv_cq* completions() const noexcept { return completions_.get(); }

  /// Readable when there is an event. Belongs to this object.
  [[nodiscard]] int event_descriptor() const noexcept { return channel_->fd; }
  /// Its owners may wait for the descriptor, also when this object is gone.
  [[nodiscard]] std::shared_ptr<const ibv_comp_channel> event_channel() const noexcept { return channel_; }
  /// Requests an event for the next completion. Poll once more after it, for earlier completions.
  [[nodiscard]] std::error_code arm();
  void take_events();

 private:
  static constexpr std::uint64_t receive_flag = std::uint64_t{1} << 63;

  void create();
  [[nodiscard]] bool create_pair(const QueuePairSize& size);
  void change_to_init();
  [[nodiscard]] const RegisteredBuffer& add_memory(std::size_t places);
  [[nodiscard]] std::error_code post_new_buffers(const RegisteredBuffer& memory, std::size_t count);
  [[nodiscard]] kit::Failure change_to_ready(const RailEndpoint& peers);

  const std::shared_ptr<RailDomain> domain_;
  const QueuePairOptions options_;
  PortAddress address_;
  struct Buffer {
    std::byte* memory = nullptr;
    std::uint32_t key = 0;
  };
  std::vector<RegisteredBuffer>
      memory_;                   ///< In the first one are the first receive buffers, and behind them the first slots.
  std::vector<Buffer> buffers_;  ///< To receive into.
  std::size_t slot_count_ = first_slots;
  std::shared_ptr<ibv_comp_channel> channel_;
  CompletionQueuePtr completions_;
  QueuePairPtr pair_;
  RailEndpoint endpoint_;
  RailTerms terms_;
  std::size_t depth_ = 0;
  std::size_t max_inline_ = 0;
  std::size_t max_pieces_ = 0;
  std::size_t slot_bytes_ = message_bytes;
};

}  // namespace kvferry::rdma
