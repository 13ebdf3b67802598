// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::schedules {

/// How many of the next questions and answers get lost on their way.
void lose_handshake_messages(std::size_t count);

}  // namespace kvferry::schedules
