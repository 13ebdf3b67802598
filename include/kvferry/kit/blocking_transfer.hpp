// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_BLOCKING_TRANSFER_HPP
#define KVFERRY_KIT_BLOCKING_TRANSFER_HPP

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <system_error>
#include <utility>

#include <kvferry/kit/blocking_wait.hpp>

#include <kvferry/detail/event_descriptor.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The state of a blocking transfer that waits for its completion, which is a call of this. Shared with the handler,
/// which may still be inside `complete` when the waiting thread has gone on.
class BlockingTransfer final : public BlockingWait {  // NOLINT(cppcoreguidelines-virtual-class-destructor): final
 public:
  explicit BlockingTransfer(std::shared_ptr<EventDescriptors> events) : events_(std::move(events)) {}

  /// Once, from any thread.
  void complete(std::error_code cause, std::size_t transferred);
  void operator()(std::error_code cause, std::size_t transferred) { complete(cause, transferred); }

  [[nodiscard]] bool over() const noexcept override { return state_.load(std::memory_order_acquire) == State::over; }
  [[nodiscard]] int descriptor() override;

  /// Sleeps until the transfer has ended.
  std::size_t wait(std::error_code& cause);

 private:
  enum class State { polled, awaited, over };

  /// @return whether `complete` wakes the waiting thread; else it is over already.
  [[nodiscard]] bool await() noexcept;

  std::atomic<State> state_{State::polled};
  bool awaited_ = false;  ///< What `await` has returned. Of the waiting thread.
  std::mutex mutex_;
  bool told_ = false;
  std::condition_variable ended_;
  const std::shared_ptr<EventDescriptors> events_;
  std::unique_ptr<EventDescriptor> event_;  ///< Null until somebody asks for a descriptor.
  std::error_code cause_;
  std::size_t transferred_ = 0;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_BLOCKING_TRANSFER_HPP
