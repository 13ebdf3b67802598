// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/striped_operation.hpp>

#include <system_error>
#include <utility>

namespace kvferry::inline KVFERRY_ABI::kit {

// Nobody else holds it: no buffer of it is touched any more.
KVFERRY_INLINE StripedOperation::~StripedOperation() {
  if (remaining_ != 0) {
    operation_->finish(cause_ ? cause_ : std::make_error_code(std::errc::not_enough_memory), std::move(why_));
  }
}

}  // namespace kvferry::kit
