// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <system_error>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {

/// For sentences about messages.
inline std::string text(std::uint64_t number) { return std::to_string(number); }

/// A status as it came over the wire. Only what can be true of a single batch is believed.
inline std::error_code status_code(std::uint32_t status) {
  switch (static_cast<errc>(status)) {
    case errc::count_mismatch:
    case errc::resource_limit:
    case errc::peer_cancelled: return static_cast<errc>(status);
    default: return status == 0 ? std::error_code() : std::error_code(errc::protocol_violation);
  }
}

}  // namespace kvferry::rdma
