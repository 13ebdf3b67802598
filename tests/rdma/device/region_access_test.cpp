// SPDX-License-Identifier: Apache-2.0
// What a region's `peer_access` doesn't allow its adapter refuses, whoever asks: here a queue pair that uses the region's
// key for it, with none of the library's checks in between.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "rdma/borrowed_memory.hpp"
#include "rdma/queue_pair.hpp"
#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

constexpr std::byte owners{0x11};
constexpr std::byte strangers{0x66};

/// A queue pair with all that a peer is told of it.
struct End {
  explicit End(std::shared_ptr<RailDomain> domain) : pair(std::move(domain), 0, options()) {
    endpoint.message_bytes = message_bytes;
    endpoint.messages = messages;
    endpoint.rails.push_back(pair.endpoint());
  }

  static QueuePairOptions options() {
    QueuePairOptions options;
    options.queue_depth = 16;
    options.read_depth = 4;
    options.timeout_exponent = 14;
    options.retry_count = 6;
    return options;
  }

  QueuePair pair;
  Endpoint endpoint;
};

/// A rail on the first port, with one region.
std::shared_ptr<RailDomains> open(std::span<std::byte> memory, Access access,
                                  RailDomain::Use use = RailDomain::Use::of_channel) {
  MemoryRegion region{memory.data(), memory.size(), page_size};
  region.peer_access = access;
  return std::make_shared<RailDomains>(std::make_shared<RailDevice>(first_rails(1)[0], std::string()),
                                       std::span(&region, 1), RegistrationOptions(), use);
}

/// The first registered memory of a domain that has one region.
Slice slice_of(RailDomain& domain, std::span<std::byte> memory) {
  const MemoryRegion region{memory.data(), memory.size(), page_size};
  const auto regions = domain.regions([&] { return kit::RegionList::of({&region, 1}); });
  const Slice* hint = nullptr;
  const Slice* const slice = regions->find(address_of(memory.data()), hint);
  EXPECT_NE(slice, nullptr);
  return slice == nullptr ? Slice() : *slice;
}

/// One request of a page's size on a connection of its own with a queue pair in this domain, with `key`, to or from
/// `address`.
ibv_wc_status request(ibv_wr_opcode opcode, const std::shared_ptr<RailDomain>& owner, std::uint64_t address,
                      std::uint32_t key, std::vector<std::byte>& memory) {
  const auto stranger = open(memory, Access::none)->for_link();
  End own(owner);
  End other(stranger);
  EXPECT_FALSE(own.pair.connect(other.endpoint, other.pair.endpoint()));
  EXPECT_FALSE(other.pair.connect(own.endpoint, own.pair.endpoint()));
  const Slice local = slice_of(*stranger, memory);
  const auto list = std::make_unique<WorkList>();
  list->clear();
  ibv_send_wr& work = list->add_request(opcode);
  work.wr.rdma.remote_addr = address;
  work.wr.rdma.rkey = key;
  list->add_piece(local.begin, page_size, local.local_key);
  EXPECT_FALSE(other.pair.post(*list));
  std::array<ibv_wc, 1> completion{};
  EXPECT_TRUE(eventually([&] { return other.pair.poll(completion) != 0; }));
  return completion[0].status;
}

bool holds(const std::vector<std::byte>& memory, std::byte value) {
  return std::ranges::all_of(memory, [&](std::byte byte) { return byte == value; });
}

TEST(RdmaFaults, Line19_AnAdapterRefusesWhatARegionsAccessDoesntAllow) {
  for (const Access access : {Access::none, Access::read, Access::write, Access::read_write}) {
    for (const ibv_wr_opcode opcode : {IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ}) {
      SCOPED_TRACE(std::string(opcode == IBV_WR_RDMA_READ ? "read" : "write") + ", access " +
                   std::to_string(static_cast<int>(access)));
      std::vector<std::byte> memory(page_size, owners);
      std::vector<std::byte> of_stranger(page_size, strangers);
      const auto owner = open(memory, access)->for_link();
      const Slice slice = slice_of(*owner, memory);
      const bool allowed = allows(access, opcode == IBV_WR_RDMA_READ ? Access::read : Access::write);
      EXPECT_EQ(request(opcode, owner, slice.begin, slice.remote_key, of_stranger),
                allowed ? IBV_WC_SUCCESS : IBV_WC_REM_ACCESS_ERR);
      EXPECT_TRUE(holds(memory, allowed && opcode == IBV_WR_RDMA_WRITE ? strangers : owners));
      EXPECT_TRUE(holds(of_stranger, allowed && opcode == IBV_WR_RDMA_READ ? owners : strangers));
    }
  }
}

TEST(RdmaFaults, Line19_AnAdapterRefusesWhatLiesBesideARegion) {
  std::vector<std::byte> memory(3 * page_size, owners);
  const auto owner = open(std::span(memory).subspan(page_size, page_size), Access::read_write)->for_link();
  const std::uint64_t begin = address_of(memory.data()) + page_size;
  for (const std::uint64_t address : {begin - page_size, begin - 1, begin + 1, begin + page_size}) {
    for (const ibv_wr_opcode opcode : {IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ}) {
      std::vector<std::byte> of_stranger(page_size, strangers);
      const std::uint32_t key = owner->region_keys()[0].keys[0];
      EXPECT_EQ(request(opcode, owner, address, key, of_stranger), IBV_WC_REM_ACCESS_ERR);
      EXPECT_TRUE(holds(memory, owners));
      EXPECT_TRUE(holds(of_stranger, strangers));
    }
  }
}

TEST(RdmaFaults, Line19_AnAdapterRefusesAnotherPeersKeyWherePeersAreIsolated) {
  for (const auto use : {RailDomain::Use::of_channel, RailDomain::Use::of_link}) {
    const bool isolated = use == RailDomain::Use::of_link;
    for (const ibv_wr_opcode opcode : {IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ}) {
      SCOPED_TRACE(std::string(opcode == IBV_WR_RDMA_READ ? "read" : "write") + (isolated ? ", isolated" : ""));
      std::vector<std::byte> memory(page_size, owners);
      std::vector<std::byte> of_stranger(page_size, strangers);
      const auto rail = open(memory, Access::read_write, use);
      const auto of_first = rail->for_link();
      const auto of_second = rail->for_link();
      const std::uint64_t address = address_of(memory.data());
      const std::uint32_t key = of_first->region_keys()[0].keys[0];
      EXPECT_EQ(request(opcode, of_second, address, key, of_stranger),
                isolated ? IBV_WC_REM_ACCESS_ERR : IBV_WC_SUCCESS);
      EXPECT_TRUE(holds(memory, !isolated && opcode == IBV_WR_RDMA_WRITE ? strangers : owners));
      EXPECT_TRUE(holds(of_stranger, !isolated && opcode == IBV_WR_RDMA_READ ? owners : strangers));
      EXPECT_EQ(request(opcode, of_first, address, key, of_stranger), IBV_WC_SUCCESS) << "the peer's own key";
      // On a queue pair in the same domain, of which a link has none any more: the registration alone is looked at.
      of_first->link_ended();
      EXPECT_EQ(request(opcode, of_first, address, key, of_stranger),
                isolated ? IBV_WC_REM_ACCESS_ERR : IBV_WC_SUCCESS);
      EXPECT_EQ(request(opcode, of_second, address, of_second->region_keys()[0].keys[0], of_stranger), IBV_WC_SUCCESS)
          << "the other peer's goes on";
    }
  }
}

TEST(RdmaFaults, Line19_ARecvsBuffersAreClosedToOtherPeersWherePeersAreIsolated) {
  for (const auto use : {RailDomain::Use::of_channel, RailDomain::Use::of_link}) {
    SCOPED_TRACE(use == RailDomain::Use::of_link ? "isolated" : "not isolated");
    std::vector<std::byte> memory(page_size, owners);
    std::vector<std::byte> buffer(16 * page_size, owners);
    std::vector<std::byte> of_stranger(page_size, strangers);
    const auto rail = open(memory, Access::none, use);
    const auto of_first = rail->for_link();
    const auto of_second = rail->for_link();
    const MutableBuffer object(buffer);
    OfferedBuffers offered;
    ASSERT_FALSE(OfferedBuffers::offer(SliceTable(), of_first->handle(), {&object, 1}, 100, offered));
    ASSERT_EQ(offered.posted()[0].direct, 1U);
    const bool isolated = use == RailDomain::Use::of_link;
    EXPECT_EQ(request(IBV_WR_RDMA_WRITE, of_second, address_of(buffer.data()), offered.posted()[0].key, of_stranger),
              isolated ? IBV_WC_REM_ACCESS_ERR : IBV_WC_SUCCESS);
    EXPECT_EQ(holds(buffer, owners), isolated);
    EXPECT_EQ(request(IBV_WR_RDMA_WRITE, of_first, address_of(buffer.data()), offered.posted()[0].key, of_stranger),
              IBV_WC_SUCCESS);
  }
}

TEST(RdmaFaults, AForkedChildHasThePagesThatRegisteredMemoryLiesIn) {
  std::vector<std::byte> memory(page_size, owners);
  const auto owner = open(memory, Access::read_write);
  if (ibv_is_fork_initialized() != IBV_FORK_UNNEEDED) {
    GTEST_SKIP() << "this kernel doesn't copy registered memory when a process forks";
  }
  const pid_t child = ::fork();
  if (child == 0) {
    ::_exit(memory.front() == owners ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

}  // namespace
}  // namespace kvferry::rdma::testing
