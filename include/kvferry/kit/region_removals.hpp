// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_REGION_REMOVALS_HPP
#define KVFERRY_KIT_REGION_REMOVALS_HPP

#include <asio/any_io_executor.hpp>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <system_error>

#include <kvferry/completion.hpp>
#include <kvferry/kit/operation.hpp>

#include <kvferry/kit/fence.hpp>
#include <kvferry/kit/operation_registry.hpp>
#include <kvferry/kit/peer_directory.hpp>
#include <kvferry/kit/region_table.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Takes regions of a channel back: asks the peers that may still touch a region, and waits for the operations that do.
/// When the time is over, links are broken and operations are stopped.
class RegionRemovals : public std::enable_shared_from_this<RegionRemovals> {
 public:
  /// @param forget deregisters a region at the transport; called when nothing uses it any more, before its removal
  ///   ends, without locks. Null: nothing has to be done.
  RegionRemovals(std::shared_ptr<RegionTable> table, std::shared_ptr<OperationRegistry> operations,
                 std::shared_ptr<DeadlineQueue> deadlines, const asio::any_io_executor& executor,
                 std::function<void(std::uint32_t)> forget)
      : table_(std::move(table)),
        operations_(std::move(operations)),
        deadlines_(std::move(deadlines)),
        executor_(executor),
        forget_(std::move(forget)) {}

  /// Takes a region back, or joins a removal under way. If memory is used up, the call ends with
  /// `std::errc::not_enough_memory`, and another call can go on.
  void remove(std::uint32_t number, Clock::time_point deadline, RemoveRegionCompletion completion,
              const std::shared_ptr<PeerDirectory>& peers);
  /// Ends what is left, and has the later ones end without the executor, which nobody may run any more. To be called when
  /// the channel's links have been shut and its operations have ended.
  void close();

 private:
  class Removal;

  /// With the lock held. @return null if there is no such region, or it has been removed; then `refused` says so.
  [[nodiscard]] std::shared_ptr<Removal> enter(std::uint32_t number, Clock::time_point deadline,
                                               const std::shared_ptr<PlainCall>& call,
                                               const std::shared_ptr<PeerDirectory>& peers, std::error_code& refused);
  void ended(std::uint32_t number);

  const std::shared_ptr<RegionTable> table_;
  const std::shared_ptr<OperationRegistry> operations_;
  const std::shared_ptr<DeadlineQueue> deadlines_;
  const asio::any_io_executor executor_;
  const std::function<void(std::uint32_t)> forget_;

  std::mutex mutex_;
  bool closed_ = false;
  std::map<std::uint32_t, std::shared_ptr<Removal>> removals_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_REGION_REMOVALS_HPP
