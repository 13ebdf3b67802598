// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <utility>

#include <kvferry/kit/operation.hpp>

namespace kvferry::tcp {

/// An operation of which each of several lanes carries a part (or one lane all of it). It ends with its last part.
class StripedOperation {
 public:
  StripedOperation(std::shared_ptr<kit::Operation> operation, std::size_t parts)
      : operation_(std::move(operation)), remaining_(parts) {}

  [[nodiscard]] const std::shared_ptr<kit::Operation>& operation() const noexcept { return operation_; }

  /// A part has ended; no buffer of it is touched any more. The first error is kept.
  /// @return true if that was the last part and none failed: the caller ends the operation.
  [[nodiscard]] bool part_done(std::error_code cause, std::string why) {
    {
      const std::lock_guard lock(mutex_);
      if (cause && !cause_) {
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
  const std::shared_ptr<kit::Operation> operation_;
  std::mutex mutex_;
  std::size_t remaining_;
  std::error_code cause_;
  std::string why_;
};

}  // namespace kvferry::tcp
