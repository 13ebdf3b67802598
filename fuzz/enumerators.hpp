// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::fuzz {

/// The values of an enumeration of one byte, rising. `is_one` has a switch without a default, so that the compiler asks for each that is new.
template <class Enum, bool (*is_one)(Enum)>
constexpr auto enumerators() {
  constexpr auto count = [] {
    std::size_t values = 0;
    for (unsigned value = 0; value < 256; ++value) {
      values += is_one(static_cast<Enum>(value)) ? 1U : 0U;
    }
    return values;
  }();
  std::array<Enum, count> all{};
  std::size_t at = 0;
  for (unsigned value = 0; value < 256; ++value) {
    if (is_one(static_cast<Enum>(value))) {
      all[at++] = static_cast<Enum>(value);
    }
  }
  return all;
}

}  // namespace kvferry::fuzz
