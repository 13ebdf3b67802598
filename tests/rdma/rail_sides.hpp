// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/io_context.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include <kvferry/kit/operation_registry.hpp>
#include <kvferry/kit/region_table.hpp>
#include "rdma/rail_protocol.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma::testing {

inline constexpr std::size_t page = 4096;
inline constexpr std::size_t slot_count = 4;
inline constexpr std::size_t small_message = min_message_bytes;
inline constexpr std::uint32_t first_slots_key = 2;  ///< Those that come later have the next ones.
inline constexpr std::size_t queue_depth = 16;
inline constexpr std::size_t eager_bytes = 512;

/// A channel as a rail sees it.
class Host final : public kit::LinkHost {
 public:
  explicit Host(const MemoryRegion& region) : regions({&region, 1}), told_(regions.now()) {
    peer_.id = "peer";
    peer_.regions = {{region.size, region.page_size, Access::read_write}};
    peer_.next_region = 1;
  }

  [[nodiscard]] const kit::PeerDescription& peer() const noexcept override { return peer_; }
  [[nodiscard]] std::shared_ptr<const kit::RegionList> local_regions() const override { return regions.now(); }
  [[nodiscard]] std::shared_ptr<const kit::RegionList> told_regions() const override { return told_; }
  [[nodiscard]] bool peer_region_added(const RemoteRegion& region) override {
    added.push_back(region);
    return added.size() < most_added;
  }
  void peer_region_removed(std::uint32_t number) override { removed.push_back(number); }
  [[nodiscard]] bool deliver_notification(std::vector<std::byte> payload, std::uint64_t key) override {
    notifications.push_back(std::move(payload));
    notification_keys.push_back(key);
    return true;
  }
  void link_failed(const kit::Link&, std::error_code) override {}
  [[nodiscard]] bool take_memory(std::size_t bytes) override {
    if (bytes > memory_limit - memory_taken) {
      return false;
    }
    memory_taken += bytes;
    return true;
  }
  void give_back_memory(std::size_t bytes) noexcept override { memory_taken -= bytes; }
  void checksums_differed(std::size_t objects) noexcept override { differed += objects; }

  std::size_t memory_limit = std::size_t{1} << 30;
  std::size_t memory_taken = 0;
  std::size_t differed = 0;
  std::vector<std::vector<std::byte>> notifications;
  std::vector<std::uint64_t> notification_keys;
  kit::RegionTable regions;
  std::vector<RemoteRegion> added;  ///< The peer's.
  std::vector<std::uint32_t> removed;
  std::size_t most_added = 16;

 private:
  kit::PeerDescription peer_;
  const std::shared_ptr<const kit::RegionList> told_;
};

/// Passes on that an operation is to be stopped; the tests start them themselves.
class StoppingLink final : public kit::Link {
 public:
  explicit StoppingLink(std::optional<RailProtocol>& protocol) : protocol_(protocol) {}
  void start(std::shared_ptr<kit::Operation>) override {}
  void stop(std::shared_ptr<kit::Operation> operation) override { protocol_->stop(*operation); }
  void shut(std::error_code, const std::string&) override {}
  [[nodiscard]] std::string path() const override { return {}; }

 private:
  std::optional<RailProtocol>& protocol_;
};

struct Outcome {
  int calls = 0;
  std::error_code ec;
  std::size_t count = 0;
};

/// One end of a rail, with memory that the peer may read and write.
struct Side {
  explicit Side(std::size_t pages, std::size_t buffers)
      : memory(pages * page),
        slots(slot_count * small_message),
        host(std::make_shared<Host>(MemoryRegion{memory.data(), memory.size(), page})),
        own_buffers(buffers),
        deadlines(std::make_shared<kit::DeadlineQueue>(context.get_executor())),
        registry(std::make_shared<kit::OperationRegistry>(deadlines, 1U << 20)) {
    const std::uint64_t begin = address_of(memory.data());
    table.add({begin, begin + memory.size(), 1, 1, true, false});
  }
  ~Side() {
    if (protocol) {
      protocol->fail(errc::closed, "the test ends");
    }
  }

  void join(const Side& peer) {
    RailTerms terms;
    terms.peer_buffers = peer.own_buffers;
    terms.peer_buffers_at_first = peer.first_buffers.value_or(peer.own_buffers);
    terms.own_buffers = own_buffers;
    terms.own_buffers_at_first = first_buffers.value_or(own_buffers);
    terms.most_slots = most_slots;
    terms.queue_depth = depth;
    terms.request.pieces = 4;
    terms.request.bytes = request_bytes;
    terms.eager_bytes = eager_bytes;
    terms.checks = peer.checks;
    const RegionKeys first{address_of(peer.memory.data()), peer.memory.size(), {1}};
    link_regions = std::make_shared<LinkRegions>(
        rails,
        [this](std::size_t, std::uint32_t number) {
          keys_asked_for(number);
          return keys_of(number);
        },
        std::vector<PeerRegion>{{0, page, {first, first}}}, 1);
    protocol.emplace(host, link_regions, 0, MessageSlots{slots.data(), slot_count, small_message, first_slots_key},
                     terms, look);
  }

  /// Gives the protocol more memory for messages, as much as it has. @return whether it wanted any.
  bool grow() {
    const bool wanted = protocol->wants_slots() || protocol->wants_buffers();
    if (protocol->wants_slots()) {
      const std::size_t count = std::min(protocol->slot_count(), most_slots - protocol->slot_count());
      more_slots.emplace_back(count * small_message);
      protocol->add_slots({more_slots.back().data(), count, small_message,
                           first_slots_key + static_cast<std::uint32_t>(more_slots.size())});
    }
    if (protocol->wants_buffers()) {
      protocol->add_buffers(std::min(protocol->buffer_count(), own_buffers - protocol->buffer_count()));
    }
    return wanted;
  }

  /// The key of the slot that these bytes lie in; none: of no slot.
  [[nodiscard]] std::optional<std::uint32_t> slot_key(std::uint64_t address, std::size_t size) const {
    const auto lies_in = [&](const std::vector<std::byte>& memory_of_slots) {
      const std::uint64_t offset = address - address_of(memory_of_slots.data());
      return offset < memory_of_slots.size() && offset % small_message == 0 && size <= small_message;
    };
    if (lies_in(slots)) {
      return first_slots_key;
    }
    const auto later = std::ranges::find_if(more_slots, lies_in);
    return later == more_slots.end()
               ? std::nullopt
               : std::optional(first_slots_key + 1 + static_cast<std::uint32_t>(later - more_slots.begin()));
  }

  std::shared_ptr<kit::Operation> start(TransferRequest request, const std::shared_ptr<Outcome>& outcome) {
    auto operation = std::make_shared<kit::Operation>(
        std::move(request), Completion::direct([outcome](std::error_code ec, std::size_t count) {
          ++outcome->calls;
          outcome->ec = ec;
          outcome->count = count;
        }),
        kit::Clock::now() + std::chrono::hours(1), registry);
    (void)registry->add(operation);
    try {
      hand_over(operation);
    } catch (const std::bad_alloc&) {
      operation->finish(std::make_error_code(std::errc::not_enough_memory));  // the registry would keep it, and it the registry
      throw;
    }
    return operation;
  }

  [[nodiscard]] RailProtocol::Preparation prepared() const { return {std::make_shared<SliceTable>(table), {}, {}}; }

  void hand_over(const std::shared_ptr<kit::Operation>& operation) {
    operation->start_on(link);
    RailProtocol::Preparation preparation = prepared();
    if (operation->request().kind == TransferKind::recv) {
      preparation.offered = std::make_unique<OfferedBuffers>();
      if (OfferedBuffers::offer(table, nullptr, operation->request().objects, eager_bytes, *preparation.offered)) {
        throw std::logic_error("the recv's buffers can't be offered");
      }
    }
    if (operation->request().checksums.value_or(false)) {
      preparation.uncompared = landing_on_others(operation->request(), link_regions->addresses_of_peers());
    }
    const std::size_t count = operation->object_count();
    auto batch = std::make_shared<kit::StripedOperation>(operation, 1);
    before_start();
    protocol->start(std::move(batch), {0, count}, std::move(preparation));
  }

  [[nodiscard]] MutableBuffer at(std::size_t offset, std::size_t size) {
    return MutableBuffer(memory).subspan(offset, size);
  }

  /// Registers memory as a region that comes later.
  std::uint32_t add_region(std::size_t offset, std::size_t size) {
    const MemoryRegion region{memory.data() + offset, size, page};
    return host->regions.add(region, [&](const LocalRegion& added) {
      keys[added.number] = {address_of(region.data), 2 * page,
                            std::vector<std::uint32_t>((size - 1) / (2 * page) + 1, 1), added.number};
    });
  }
  void take_region_back(std::uint32_t number) {
    errc refusal{};
    (void)host->regions.remove(number, refusal);
  }
  [[nodiscard]] std::optional<RegionKeys> keys_of(std::uint32_t number) const {
    const auto it = keys.find(number);
    return it == keys.end() ? std::nullopt : std::optional(it->second);
  }

  asio::io_context context;
  std::vector<std::byte> memory;
  std::vector<std::byte> slots;
  std::deque<std::vector<std::byte>> more_slots;
  std::shared_ptr<Host> host;
  std::map<std::uint32_t, RegionKeys> keys;  ///< Of regions that came later.
  std::function<void(std::uint32_t)> keys_asked_for = [](std::uint32_t) {};  ///< Called before they are looked up.
  std::vector<std::uint64_t> rails{0};       ///< Of the link that the rail is the first of.
  std::shared_ptr<LinkRegions> link_regions;
  SliceTable table;
  std::shared_ptr<const MemoryLook> look = std::make_shared<const MemoryLook>();
  std::size_t own_buffers;
  std::optional<std::size_t> first_buffers;  ///< Those that are there at first; none: all.
  std::size_t most_slots = slot_count;
  std::size_t checks = max_checks;
  std::size_t depth = queue_depth;
  std::size_t request_bytes = page;
  std::shared_ptr<kit::DeadlineQueue> deadlines;
  std::shared_ptr<kit::OperationRegistry> registry;
  std::optional<RailProtocol> protocol;
  std::shared_ptr<kit::Link> link = std::make_shared<StoppingLink>(protocol);
  std::deque<std::vector<std::byte>> arrived;  ///< Messages in receive buffers.
  std::size_t most_arrived = 0;
  std::function<void()> before_start = [] {};  ///< Called when all but the protocol's own part has been done.
};

/// Does what an adapter would do with a request.
inline void carry_out(const ibv_send_wr& request, Side& to) {
  std::vector<std::byte> message;
  std::uint64_t remote = request.wr.rdma.remote_addr;
  if (request.num_sge == 0 && request.sg_list != nullptr) {
    throw std::logic_error("a list of no pieces, of which some adapters take the first one");
  }
  for (int i = 0; i < request.num_sge; ++i) {
    const ibv_sge& piece = request.sg_list[i];
    auto* const local = reinterpret_cast<std::byte*>(piece.addr);
    if (request.opcode == IBV_WR_SEND) {
      message.insert(message.end(), local, local + piece.length);
      continue;
    }
    const Slice* hint = nullptr;
    if (!to.table.covers(remote, piece.length, hint)) {
      throw std::out_of_range("a work request beyond the peer's region");
    }
    auto* const there = reinterpret_cast<std::byte*>(remote);
    request.opcode == IBV_WR_RDMA_READ ? std::memcpy(local, there, piece.length)
                                       : std::memcpy(there, local, piece.length);
    remote += piece.length;
  }
  if (request.opcode == IBV_WR_SEND) {
    to.arrived.push_back(std::move(message));
    to.most_arrived = std::max(to.most_arrived, to.arrived.size());
  }
}

inline TransferRequest paired(TransferKind kind, std::vector<MutableBuffer> objects, std::uint64_t tag) {
  TransferRequest request;
  request.kind = kind;
  request.peer_id = "peer";
  request.objects = std::move(objects);
  request.tag = tag;
  return request;
}

inline TransferRequest one_sided(TransferKind kind, std::vector<MutableBuffer> objects,
                                 std::vector<std::uint64_t> indexes, std::vector<std::byte> notification = {}) {
  TransferRequest request;
  request.kind = kind;
  request.peer_id = "peer";
  request.objects = std::move(objects);
  request.remote_indexes = std::move(indexes);
  request.notification = std::move(notification);
  return request;
}

}  // namespace kvferry::rdma::testing
