// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "endpoint.hpp"
#include "rail_device.hpp"
#include "verbs.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

/// Makes the address of a peer's queue pair: by LID within an InfiniBand subnet, by GID elsewhere and
/// where either port needs it.
[[nodiscard]] ibv_ah_attr address_vector(const PortAddress& own, std::uint8_t port, const RailEndpoint& peers,
                                         std::uint8_t service_level, std::uint8_t traffic_class);

}  // namespace kvferry::rdma
