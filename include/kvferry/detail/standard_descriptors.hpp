// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Where a program has closed its standard input, output or error output, the next socket would get that number, and
/// what the program or one of its libraries prints would go to a peer. So /dev/null takes the place first.
void occupy_standard_descriptors() noexcept;

}  // namespace kvferry
