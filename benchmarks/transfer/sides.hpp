// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "common/program.hpp"

namespace bench {

/// One channel that moves pages to or from all peers.
[[nodiscard]] std::unique_ptr<Initiator> make_transfer_initiator(const Setup& setup, const Json& endpoint);

/// A channel for each peer, which for one-sided transfers has nothing to do.
[[nodiscard]] std::unique_ptr<Target> make_transfer_target(const Setup& setup);

}  // namespace bench
