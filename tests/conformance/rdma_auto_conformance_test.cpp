// SPDX-License-Identifier: Apache-2.0
// The channel of several transports over its RDMA road: what RDMA itself is put to isn't repeated, but for what passes through
// the road between the two.
#include <algorithm>
#include <array>

#include "conformance/auto_traits.hpp"
#include "conformance/rdma_traits.hpp"

#include <kvferry/testing/conformance_transports.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

struct AutoOverRdma : AutoTraits<AutoOverRdma> {
  static constexpr std::string_view name = "OverRdma";
  static constexpr std::chrono::milliseconds wait_limit = OneRail::wait_limit;

  static constexpr bool takes(std::string_view suite) {
    constexpr std::array suites{std::string_view("Regions"), std::string_view("Checksums"), std::string_view("ConnectTest"),
                                std::string_view("OneSidedTest"), std::string_view("PairedTest"),
                                std::string_view("PeersTest")};
    return std::ranges::find(suites, suite) != suites.end();
  }

  static std::vector<AutoRoad> roads() {
    RdmaOptions rdma;
    rdma.rails = RdmaTransferChannel::active_rails();
    rdma.rails.resize(std::min<std::size_t>(rdma.rails.size(), 1));
    return {road<RdmaTransferChannel>("rdma", std::move(rdma)), AutoTransferChannel::default_roads().at(1)};
  }
};

}  // namespace kvferry::testing

KVFERRY_INSTANTIATE_CONFORMANCE_SUITE(Auto, AutoOverRdma);
