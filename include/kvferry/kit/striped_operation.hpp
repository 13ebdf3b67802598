// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_STRIPED_OPERATION_HPP
#define KVFERRY_KIT_STRIPED_OPERATION_HPP

#include <algorithm>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/kit/operation.hpp>

#include <kvferry/kit/blocks.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Objects `[begin, end)` of a batch.
struct ObjectRange {
  std::size_t begin = 0;
  std::size_t end = 0;
};

/// Cuts a batch into at most `parts` contiguous parts of about the same number of bytes.
[[nodiscard]] inline std::vector<ObjectRange> cut_into_stripes(const LocalBytes& objects, std::size_t bytes_of_all,
                                                               std::size_t parts) {
  const std::size_t share = std::max<std::size_t>((bytes_of_all + parts - 1) / parts, 1);
  std::vector<ObjectRange> ranges;
  ObjectRange range;
  std::size_t bytes = 0;
  while (range.end < objects.count()) {
    bytes += objects.size(range.end++);
    if (bytes >= share && ranges.size() + 1 < parts) {
      ranges.push_back(std::exchange(range, {range.end, range.end}));
      bytes = 0;
    }
  }
  if (range.begin != range.end) {
    ranges.push_back(range);
  }
  return ranges;
}

/// An operation whose parts go over several lanes or rails, or as a whole over one of them. It ends with its last part.
/// If parts are dropped before their end, because of an exception, it ends with an error.
class KVFERRY_EXPORT StripedOperation {
 public:
  StripedOperation(std::shared_ptr<Operation> operation, std::size_t parts)
      : operation_(std::move(operation)), parts_(parts), remaining_(parts) {
    operation_->in_parts_ = true;
  }
  StripedOperation(const StripedOperation&) = delete;
  StripedOperation& operator=(const StripedOperation&) = delete;
  ~StripedOperation();

  [[nodiscard]] const std::shared_ptr<Operation>& operation() const noexcept { return operation_; }
  [[nodiscard]] std::size_t parts() const noexcept { return parts_; }

  /// Reports that a part has ended; no buffer of it is touched any more. The first error is kept, unless a later one
  /// belongs to `condition::may_still_land`.
  /// @return true if that was the last part and none failed: the caller ends the operation.
  [[nodiscard]] bool part_done(std::error_code cause, std::string why) {
    {
      std::unique_lock lock(mutex_, std::defer_lock);
      if (parts_ != 1) {
        lock.lock();
      }
      if (cause && (!cause_ || (cause == condition::may_still_land && cause_ != condition::may_still_land))) {
        cause_ = cause;
        why_ = std::move(why);
      }
      if (--remaining_ != 0) {
        return false;
      }
    }
    if (cause_) {
      operation_->finish(cause_, std::move(why_));
      return false;
    }
    return true;
  }

 private:
  const std::shared_ptr<Operation> operation_;
  const std::size_t parts_;
  std::mutex mutex_;
  std::size_t remaining_;
  std::error_code cause_;
  std::string why_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_STRIPED_OPERATION_HPP
