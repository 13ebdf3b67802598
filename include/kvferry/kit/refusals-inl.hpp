// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/refusals.hpp>

#include <string>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE void Refusals::count(std::error_code cause, std::string_view source, std::string_view why) {
  counts_.count(cause);
  // A scan of the network says nothing about this process; a refusal for lack of room does.
  const bool overloaded = cause == errc::resource_limit || cause.category() == std::system_category();
  logger_->log(overloaded ? LogLevel::warning : LogLevel::info, "stranger_refused", source, cause,
               [&] { return std::string(why); });
}

}  // namespace kvferry::kit
