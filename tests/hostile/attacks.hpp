// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::hostile {

/// Where the channel under attack listens, on loopback.
struct Target {
  std::uint16_t init_port = 0;
  std::uint16_t data_port = 0;
};

/// Goes on until its process is killed.
using Attack = void (*)(const Target&);

struct NamedAttack {
  std::string_view name;
  std::string_view does;
  Attack run;
};

[[nodiscard]] std::span<const NamedAttack> attacks();

}  // namespace kvferry::hostile
