// SPDX-License-Identifier: Apache-2.0
// Registrations for isolated peers, and their lifetime: as verbs are called.
#include <gtest/gtest.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/detail/descriptor.hpp>

#include "noted_verbs.hpp"
#include "rdma/rail_device.hpp"
#include "rdma/rail_domain.hpp"
#include "rdma/rdma_node.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {
namespace {

/// How often memory is registered, of what has been noted.
std::ptrdiff_t registrations(const void* memory) {
  const std::lock_guard lock(verbs_log().mutex);
  const auto& calls = verbs_log().calls;
  const auto count = [&](VerbsLog::Verb verb) {
    return std::ranges::count_if(calls,
                                 [&](const VerbsLog::Call& call) { return call.verb == verb && call.what == memory; });
  };
  return count(VerbsLog::Verb::do_register) - count(VerbsLog::Verb::deregister);
}

/// Whether a call comes back that has to wait for the caller of this. It never fails one that waits.
template <class Result>
bool ends_soon(const std::future<Result>& call) {
  return call.wait_for(std::chrono::milliseconds(300)) == std::future_status::ready;
}

TEST(VerbsOrder, IsolatedPeersHaveRegistrationsOfTheirOwnThatEndWithTheirQueuePairs) {
  for (const std::size_t rails : {1U, 2U}) {
    SCOPED_TRACE(rails);
    verbs_log().clear();
    const auto of_each = static_cast<std::ptrdiff_t>(rails);
    Node hub(4, isolating(rails));
    const auto of_hub = [&] { return registrations(hub.region.data()); };
    EXPECT_EQ(of_hub(), 0) << "only tried";
    Node dialed(4, {.rails = rails});
    Node asking(4, {.rails = rails});
    hub.connect("hub", "dialed", dialed);
    EXPECT_EQ(of_hub(), of_each);
    asking.connect("asking", "hub", hub);
    EXPECT_EQ(of_hub(), 2 * of_each);
    std::vector<std::byte> later(page_size);
    const std::uint32_t number = hub.channel->add_region({later.data(), later.size(), page_size});
    EXPECT_EQ(registrations(later.data()), 2 * of_each);
    const auto write_later = [&](const Node& peer) {
      const auto index = indexes(1);
      std::error_code ec;
      peer.channel->batched_write(peer.pages(1), {.peer_id = "hub", .remote_indexes = index, .remote_region = number},
                                  ec);
      return ec;
    };
    EXPECT_FALSE(write_later(asking));
    hub.channel->disconnect("dialed");
    EXPECT_EQ(of_hub(), of_each);
    EXPECT_EQ(registrations(later.data()), of_each);
    EXPECT_FALSE(write_later(asking));
    EXPECT_FALSE(write_later(dialed)) << "connects anew";
    EXPECT_EQ(registrations(later.data()), 2 * of_each);
    hub.channel->remove_region(number);
    EXPECT_EQ(registrations(later.data()), 0);
    EXPECT_EQ(of_hub(), 2 * of_each);
    EXPECT_EQ(asking.channel->batched_read(asking.pages(4), {.peer_id = "hub", .remote_indexes = indexes(4)}), 4U);
    // Of a peer that goes by itself as well.
    asking.channel->close();
    EXPECT_TRUE(eventually([&] { return of_hub() == of_each; }));
    {
      const std::lock_guard lock(verbs_log().mutex);
      const auto& calls = verbs_log().calls;
      const auto last = std::find_if(calls.rbegin(), calls.rend(), [&](const VerbsLog::Call& call) {
        return call.verb == VerbsLog::Verb::deregister && call.what == hub.region.data();
      });
      ASSERT_NE(last, calls.rend());
      EXPECT_EQ(last->thread, "kvferry-join") << "not one that others need";
    }
    Node third(4, {.rails = rails});
    hub.connect("hub", "third", third);
    EXPECT_EQ(of_hub(), 2 * of_each);
    hub.channel->close();
    EXPECT_EQ(of_hub(), 0);
    const std::lock_guard lock(verbs_log().mutex);
    const auto& calls = verbs_log().calls;
    const auto last = std::find_if(calls.rbegin(), calls.rend(), [&](const VerbsLog::Call& call) {
      return call.verb == VerbsLog::Verb::deregister && call.what == hub.region.data();
    });
    ASSERT_NE(last, calls.rend());
    EXPECT_TRUE(std::none_of(calls.rbegin(), last, [&](const VerbsLog::Call& call) {
      return call.verb == VerbsLog::Verb::destroy_queue_pair && call.context == last->context;
    })) << "while a queue pair could reach it";
  }
}

TEST(VerbsOrder, ARegionThatCantBeRegisteredForAnIsolatedNewcomerEndsHisAttemptAlone) {
  verbs_log().clear();
  Node hub(4, isolating(2));
  Node first(4, {.rails = 2});
  Node newcomer(4, {.rails = 2});
  first.connect("first", "hub", hub);
  const auto reads = [](const Node& node) {
    std::error_code ec;
    const auto all = indexes(4);
    node.channel->batched_read(node.pages(4), {.peer_id = "hub", .remote_indexes = all}, ec);
    return ec;
  };
  registering_fails_at = hub.region.data();
  registrations_left = 1;  // on one rail
  try {
    newcomer.connect("newcomer", "hub", hub);
    ADD_FAILURE() << "it connected";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), errc::resource_limit);
    EXPECT_NE(std::string(error.what()).find("region 0: RDMA device"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("Cannot allocate memory"), std::string::npos) << error.what();
  }
  registrations_left = 1;
  try {
    hub.connect("hub", "newcomer", newcomer);
    ADD_FAILURE() << "it connected";
  } catch (const TransferError& error) {
    EXPECT_EQ(error.code(), std::errc::not_enough_memory);
    EXPECT_NE(std::string(error.what()).find("region 0: RDMA device"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("ulimit -l"), std::string::npos) << error.what();
  }
  registering_fails_at = nullptr;
  EXPECT_EQ(registrations(hub.region.data()), 2) << "those of the first, on two rails";
  EXPECT_FALSE(reads(first));
  newcomer.connect("newcomer", "hub", hub);
  EXPECT_FALSE(reads(newcomer));

  std::vector<std::byte> later(page_size);
  registering_fails_at = later.data();
  registrations_left = 3;
  std::error_code ec;
  (void)hub.channel->add_region({later.data(), later.size(), page_size}, ec);
  registering_fails_at = nullptr;
  EXPECT_EQ(ec, std::errc::not_enough_memory);
  EXPECT_EQ(registrations(later.data()), 0);
  EXPECT_EQ(hub.channel->regions().size(), 1U);
  EXPECT_FALSE(reads(first));
  EXPECT_FALSE(reads(newcomer));
}

TEST(VerbsOrder, ARegionThatIsRemovedWhileItIsRegisteredForAnIsolatedNewcomerIsNotRegisteredAfterwards) {
  for (const bool dialed : {false, true}) {
    SCOPED_TRACE(dialed ? "the owner connects" : "the peer connects");
    Node hub(1, isolating());
    Node peer(1);
    std::vector<std::byte> memory(page_size);
    const std::uint32_t number = hub.channel->add_region({memory.data(), memory.size(), page_size});
    verbs_log().clear();
    std::future<std::error_code> removed;
    before_registering().set(memory.data(), [&] {
      removed = std::async(std::launch::async, [&] {
        std::error_code ec;
        hub.channel->remove_region(number, long_enough, ec);
        return ec;
      });
      EXPECT_TRUE(eventually([&] { return hub.channel->regions().size() == 1; }));
      EXPECT_FALSE(ends_soon(removed)) << "the memory is about to be registered";
    });
    const auto connect = [&] {
      std::error_code ec;
      if (dialed) {
        hub.channel->lazy_init_peer_connection("hub", "peer", peer.channel->peer_init_url(), {},
                                               {.timeout = long_enough}, ec);
      } else {
        peer.channel->lazy_init_peer_connection("peer", "hub", hub.channel->peer_init_url(), {},
                                                {.timeout = long_enough}, ec);
      }
      return ec;
    };
    (void)connect();  // with the removed region's keys told: it may be cut off
    ASSERT_TRUE(removed.valid());
    EXPECT_EQ(removed.get(), std::error_code());
    EXPECT_EQ(registrations(memory.data()), 0);
    EXPECT_TRUE(eventually([&] { return !connect(); }));
    EXPECT_EQ(registrations(memory.data()), 0);
  }
}

TEST(VerbsOrder, RegionsThatComeAndGoWhileIsolatedPeersDoLeaveNoRegistrations) {
  verbs_log().clear();
  Node hub(1, isolating());
  Node peer(1);
  std::vector<std::byte> memory(page_size);
  std::atomic<bool> over{false};
  auto changes = std::async(std::launch::async, [&] {
    int rounds = 0;
    for (; !over; ++rounds) {
      hub.channel->remove_region(hub.channel->add_region({memory.data(), memory.size(), page_size}));
    }
    return rounds;
  });
  int connected = 0;
  for (int i = 0; i < 15; ++i) {
    std::error_code ec;
    // A peer that meets a removal on the way is cut off, and comes again.
    peer.channel->lazy_init_peer_connection("peer", "hub", hub.channel->peer_init_url(), {}, {.timeout = long_enough},
                                            ec);
    connected += ec ? 0 : 1;
    if (i % 2 == 0) {
      peer.channel->disconnect("hub", ec);
    } else {
      hub.channel->disconnect("peer", ec);
    }
  }
  over = true;
  EXPECT_GT(changes.get(), 0);
  EXPECT_GT(connected, 0);
  EXPECT_EQ(registrations(memory.data()), 0);
  peer.connect("peer", "hub", hub);
  EXPECT_EQ(registrations(hub.region.data()), 1);
  hub.channel->close();
  EXPECT_EQ(registrations(hub.region.data()), 0);
  EXPECT_EQ(registrations(memory.data()), 0);
}

TEST(VerbsOrder, WhatCantBeRegisteredForIsolatedPeersIsSaidBeforeAnyIsThere) {
  Node hub(4, isolating());
  std::vector<std::byte> memory(page_size);
  registering_fails_at = memory.data();
  registrations_left = 0;
  std::error_code ec;
  (void)hub.channel->add_region({memory.data(), memory.size(), page_size}, ec);
  EXPECT_EQ(ec, std::errc::not_enough_memory);
  RdmaOptions options;
  options.isolate_peers = true;
  options.rails = first_rails(1);
  options.regions.push_back({memory.data(), memory.size(), page_size});
  EXPECT_THROW(RdmaTransferChannel{options}, TransferError);
  registering_fails_at = nullptr;
}

/// Domains of links on a rail, and two pieces of memory.
class IsolatedVerbsOrder : public ::testing::Test {
 protected:
  IsolatedVerbsOrder() {
    verbs_log().clear();
    registrations_left = 0;
  }
  ~IsolatedVerbsOrder() override { registering_fails_at = nullptr; }

  [[nodiscard]] static MemoryRegion region_of(std::vector<std::byte>& memory) {
    return {memory.data(), memory.size(), page_size};
  }
  [[nodiscard]] std::unique_ptr<RailDomains> domains_with(const std::vector<MemoryRegion>& regions) const {
    return std::make_unique<RailDomains>(device, regions, RegistrationOptions(), RailDomain::Use::of_link);
  }
  static void let_registering_fail(const std::vector<std::byte>& memory, int left = 0) {
    registrations_left = left;
    registering_fails_at = memory.data();
  }

  const std::shared_ptr<RailDevice> device = std::make_shared<RailDevice>(first_rails(1)[0], "");
  std::vector<std::byte> first = std::vector<std::byte>(page_size);
  std::vector<std::byte> second = std::vector<std::byte>(page_size);
};

TEST_F(IsolatedVerbsOrder, TheTrialAtConstructionRegistersAllRegionsTogether) {
  std::ptrdiff_t together = -1;
  before_registering().set(second.data(), [&] { together = registrations(first.data()); });
  const auto domains = domains_with({region_of(first), region_of(second)});
  EXPECT_EQ(together, 1);
  EXPECT_EQ(registrations(first.data()) + registrations(second.data()), 0);
}

TEST_F(IsolatedVerbsOrder, ARegionThatCouldntBeAddedIsNotTakenForTheNextOfItsNumber) {
  const auto domains = domains_with({});
  const auto one = domains->for_link();
  std::future<std::shared_ptr<RailDomain>> newcomer;
  std::promise<void> go_on;
  before_registering().set(first.data(), [&] {
    std::promise<void> registers;
    before_registering().set(first.data(), [&] {
      registers.set_value();
      go_on.get_future().wait();
    });
    newcomer = std::async(std::launch::async, [&] { return domains->for_link(); });
    registers.get_future().wait();
    let_registering_fail(first);
  });
  auto added = std::async(std::launch::async, [&] { domains->register_region({region_of(first), 0}); });
  EXPECT_TRUE(eventually([] { return registrations_left < 0; }));
  registering_fails_at = nullptr;
  EXPECT_FALSE(ends_soon(added)) << "it is being registered for the newcomer";
  go_on.set_value();
  EXPECT_THROW(added.get(), TransferError);
  EXPECT_EQ(registrations(first.data()), 0);
  domains->register_region({region_of(second), 0});
  for (const auto& domain : {one, newcomer.get()}) {
    const auto keys = domain->keys_of(0);
    ASSERT_TRUE(keys);
    EXPECT_EQ(keys->address, address_of(second.data()));
  }
}

TEST_F(IsolatedVerbsOrder, WhatIsRemovedNeedNotBeRegisteredForANewcomer) {
  const auto domains = domains_with({region_of(first)});
  std::future<void> removed;
  before_registering().set(first.data(), [&] {
    removed = std::async(std::launch::async, [&] { domains->deregister_region(0); });
    EXPECT_TRUE(eventually([&] { return !domains->for_link()->keys_of(0); }));
    let_registering_fail(first);  // as of memory that has been unmapped
  });
  const auto newcomer = domains->for_link();
  EXPECT_TRUE(newcomer->region_keys().empty());
  removed.get();
}

TEST_F(IsolatedVerbsOrder, ARegionsRemovalWaitsForALinksEndThatIsDeregisteringIt) {
  const auto domains = domains_with({region_of(first)});
  const auto domain = domains->for_link();
  std::future<void> removed;
  before_deregistering().set(first.data(), [&] {
    removed = std::async(std::launch::async, [&] { domains->deregister_region(0); });
    EXPECT_FALSE(ends_soon(removed));
  });
  domain->link_ended();
  removed.get();
  EXPECT_EQ(registrations(first.data()), 0);
}

TEST_F(IsolatedVerbsOrder, ARegionsRemovalWaitsForADomainThatIsBeingDestroyed) {
  const auto domains = domains_with({region_of(first)});
  auto domain = domains->for_link();
  std::future<void> removed;
  before_deregistering().set(first.data(), [&] {
    removed = std::async(std::launch::async, [&] { domains->deregister_region(0); });
    EXPECT_FALSE(ends_soon(removed));
  });
  domain.reset();
  removed.get();
}

TEST_F(IsolatedVerbsOrder, ALinksEndWaitsForWhatIsAddedAndRemovedMeanwhile) {
  const auto domains = domains_with({region_of(first)});
  for (const bool adds : {true, false}) {
    SCOPED_TRACE(adds ? "added" : "removed");
    const auto domain = domains->for_link();
    std::future<void> ended;
    (adds ? before_registering() : before_deregistering()).set((adds ? second : first).data(), [&] {
      ended = std::async(std::launch::async, [&] { domain->link_ended(); });
      EXPECT_FALSE(ends_soon(ended));
    });
    if (adds) {
      domains->register_region({region_of(second), 1});
    } else {
      domains->deregister_region(0);
    }
    ended.get();
    EXPECT_EQ(registrations(first.data()) + registrations(second.data()), 0);
  }
}

TEST_F(IsolatedVerbsOrder, LinksThatHaveEndedDontKeepARegionFromBeingAdded) {
  const auto domains = domains_with({});
  const auto ended = domains->for_link();
  ended->link_ended();
  const auto lives = domains->for_link();
  let_registering_fail(first, 1);
  domains->register_region({region_of(first), 0});
  EXPECT_TRUE(lives->keys_of(0));
  EXPECT_FALSE(ended->keys_of(0));
  EXPECT_EQ(registrations(first.data()), 1);
  lives->link_ended();
  let_registering_fail(second);
  EXPECT_THROW(domains->register_region({region_of(second), 1}), TransferError) << "tried all the same";
}

TEST_F(IsolatedVerbsOrder, ClosingWaitsForWhatIsRegisteredForANewcomer) {
  const auto domains = domains_with({region_of(first)});
  std::future<void> closed;
  before_registering().set(first.data(), [&] {
    closed = std::async(std::launch::async, [&] { domains->close(); });
    EXPECT_FALSE(ends_soon(closed));
  });
  const auto newcomer = domains->for_link();
  closed.get();
  EXPECT_EQ(registrations(first.data()), 0);
  EXPECT_THROW((void)domains->for_link(), TransferError);
}

TEST(VerbsOrder, IsolatedNewcomersRegisterADmaBufWhoseDescriptorHasBeenClosed) {
  const auto make_file = [](int& descriptor) {
    descriptor = ::memfd_create("dma-buf", MFD_CLOEXEC);
    return descriptor != -1 && ::ftruncate(descriptor, page_size) == 0;
  };
  int file = -1;
  int other = -1;
  ASSERT_TRUE(make_file(file) && make_file(other));
  const Descriptor closes_other(other);
  auto* const memory = static_cast<std::byte*>(::mmap(nullptr, page_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  ASSERT_NE(memory, MAP_FAILED);
  struct stat status {};
  ASSERT_EQ(::fstat(file, &status), 0);
  dmabuf_file = status.st_ino;
  {
    MemoryRegion region{memory, page_size, page_size};
    region.dmabuf_fd = file;
    NodeOptions options = isolating();
    options.channel.regions = {region};
    Node hub(1, std::move(options));
    const std::uint32_t later = hub.channel->add_region(region);
    ASSERT_EQ(::dup3(other, file, O_CLOEXEC), file);  // closed, and its number is another's
    Node peer(1);
    peer.connect("peer", "hub", hub);
    const auto index = indexes(1);
    std::byte value{1};
    for (const std::uint32_t number : {0U, later}) {
      peer.fill(value);
      EXPECT_EQ(peer.channel->batched_write(peer.pages(1),
                                            {.peer_id = "hub", .remote_indexes = index, .remote_region = number}),
                1U);
      EXPECT_EQ(memory[page_size - 1], value);
      value = std::byte{2};
    }
    const int kept = registered_dmabuf;
    EXPECT_TRUE(is_dmabuf_file(kept));
    hub.channel->remove_region(later);
    EXPECT_FALSE(is_dmabuf_file(kept)) << "closed with the region";
  }
  dmabuf_file = 0;
  ::close(file);
  ::munmap(memory, page_size);
}

}  // namespace
}  // namespace kvferry::rdma::testing
