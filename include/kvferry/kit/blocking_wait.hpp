// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_BLOCKING_WAIT_HPP
#define KVFERRY_KIT_BLOCKING_WAIT_HPP

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// A blocking call that waits for its operation to end, as a transport sees it that lets the caller's thread move bytes
/// instead of sleep. Use it on that thread only.
class KVFERRY_EXPORT BlockingWait {
 public:
  /// Whether the operation has ended; the call is about to return.
  [[nodiscard]] virtual bool over() const noexcept = 0;
  /// A descriptor that is readable once the operation has ended, to be waited for beside others. Owned by the wait.
  /// @throws TransferError EMFILE or ENFILE; `Link::serve` may let it through.
  [[nodiscard]] virtual int descriptor() = 0;

 protected:
  ~BlockingWait() = default;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_BLOCKING_WAIT_HPP
