// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <unistd.h>

#include <cstdint>
#include <string>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// The loopback address of a process: 127.a.b.c, with a.b.c made of its process id. Linux answers at all of 127.0.0.0/8. A port
/// that a closed channel had there is given to no other process, so nobody else answers in a closed peer's place while tests run side by side.
inline std::string own_loopback(std::uint32_t process = static_cast<std::uint32_t>(::getpid())) {
  const std::uint32_t shifted = process + (1U << 16U);  // 127.0.0.x is everybody's
  return "127." + std::to_string((shifted >> 16U) & 0x7FU) + "." + std::to_string((shifted >> 8U) & 0xFFU) + "." +
         std::to_string(shifted & 0xFFU);
}

/// Where a test's channel listens: any free port of `own_loopback`.
inline std::string own_loopback_url() { return "tcp://" + own_loopback() + ":0"; }

}  // namespace kvferry::inline KVFERRY_ABI::testing
