// SPDX-License-Identifier: Apache-2.0
#include "conformance/rdma_traits.hpp"

#include <kvferry/testing/conformance_transports.hpp>

KVFERRY_INSTANTIATE_CONFORMANCE_SUITE(Rdma, OneRail, TwoRails, QueuePairs, IsolatedPeers);
