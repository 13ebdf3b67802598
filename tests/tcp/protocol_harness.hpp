// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/io_context.hpp>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include <kvferry/kit/operation_registry.hpp>
#include <kvferry/tcp/lane_protocol.hpp>
#include <kvferry/testing/patterns.hpp>

#include "common/same_bytes.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {

/// A channel's side of a lane: regions, and the notifications that arrived.
class Host final : public kit::LinkHost {
 public:
  explicit Host(const std::vector<MemoryRegion>& regions) : table(regions), told_regions_(table.now()) {
    peer_.id = "peer";
  }

  [[nodiscard]] const kit::PeerDescription& peer() const noexcept override { return peer_; }
  [[nodiscard]] std::shared_ptr<const kit::RegionList> local_regions() const override { return table.now(); }
  [[nodiscard]] std::shared_ptr<const kit::RegionList> told_regions() const override { return told_regions_; }
  [[nodiscard]] bool peer_region_added(const RemoteRegion& region) override {
    peer_regions.push_back(region);
    return ++peer_regions_now <= peer_region_limit;
  }
  void peer_region_removed(std::uint32_t number) override {
    peer_regions_gone.push_back(number);
    peer_regions_now -= std::size_t{peer_regions_now != 0};
  }
  [[nodiscard]] bool deliver_notification(std::vector<std::byte> payload, std::uint64_t key) override {
    if (notifications.size() >= notification_limit) {
      return false;
    }
    notifications.push_back(std::move(payload));
    notification_keys.push_back(key);
    return true;
  }
  void link_failed(const kit::Link&, std::error_code) override { ++failures; }
  [[nodiscard]] bool take_memory(std::size_t bytes) override {
    if (bytes > memory_limit - memory_taken) {
      return false;
    }
    memory_taken += bytes;
    most_memory_taken = std::max(most_memory_taken, memory_taken);
    return true;
  }
  void give_back_memory(std::size_t bytes) noexcept override { memory_taken -= bytes; }
  void when_writes_ended(std::function<void()> done) override {
    if (operations) {
      operations->when_writes_ended(peer_.id, std::move(done));
    } else {
      done();
    }
  }

  void checksums_differed(std::size_t objects) noexcept override { differed += objects; }

  std::vector<std::vector<std::byte>> notifications;
  std::vector<std::uint64_t> notification_keys;
  std::size_t differed = 0;
  std::size_t notification_limit = 16;
  int failures = 0;
  std::size_t memory_limit = std::size_t{1} << 30;
  std::size_t memory_taken = 0;
  std::size_t most_memory_taken = 0;
  std::shared_ptr<kit::OperationRegistry> operations;
  kit::RegionTable table;
  std::vector<RemoteRegion> peer_regions;  ///< As they were heard of.
  std::size_t peer_regions_now = 0;        ///< A test sets it to those of the handshake, where it counts.
  std::size_t peer_region_limit = kit::RegionTable::max_regions;
  std::vector<std::uint32_t> peer_regions_gone;

 private:
  kit::PeerDescription peer_;
  const std::shared_ptr<const kit::RegionList> told_regions_;
};

inline void fill(std::span<std::byte> memory, unsigned seed) { kvferry::testing::fill(MutableBuffer(memory), seed); }

inline TransferRequest request(TransferKind kind, std::vector<MutableBuffer> objects,
                               std::vector<std::uint64_t> indexes = {}) {
  TransferRequest made;
  made.kind = kind;
  made.peer_id = "peer";
  made.objects = std::move(objects);
  made.remote_indexes = std::move(indexes);
  return made;
}

/// How an operation ended.
struct Outcome {
  int calls = 0;
  std::error_code ec;
  std::size_t count = 0;
  std::string diagnostic;
  std::vector<std::error_code> statuses;
  std::vector<std::size_t> sizes;
};

/// The way from an operation to its side.
class SideLink final : public kit::Link {
 public:
  explicit SideLink(LaneProtocol& protocol) : protocol_(protocol) {}

  void start(std::shared_ptr<kit::Operation> operation) override {
    const std::size_t count = operation->object_count();
    protocol_.start(std::make_shared<StripedOperation>(std::move(operation), 1), {0, count});
  }
  void stop(std::shared_ptr<kit::Operation> operation) override { protocol_.stop(*operation); }
  void shut(std::error_code cause, const std::string& why) override { protocol_.fail(cause, why); }
  [[nodiscard]] std::string path() const override { return "a test's"; }

 private:
  LaneProtocol& protocol_;
};

/// One end of a connection without the connection.
class Side {
 public:
  static constexpr std::size_t page = 4096;
  static constexpr std::size_t pages = 1024;

  /// With one block of memory, offered twice: to read and write, and to do neither.
  explicit Side(std::size_t page_count = pages, std::shared_ptr<PeerMemory> peers = nullptr)
      : Side(std::vector<std::byte>(page * page_count), std::move(peers)) {}

  /// With regions of the caller's and no memory of its own.
  explicit Side(std::vector<MemoryRegion> regions, std::shared_ptr<PeerMemory> peers = nullptr)
      : host(std::make_shared<Host>(std::move(regions))),
        protocol(
            std::make_unique<LaneProtocol>(host, ReadAhead::unprotected(FrameReader::read_ahead), std::move(peers))),
        link_(std::make_shared<SideLink>(*protocol)),
        deadlines_(std::make_shared<kit::DeadlineQueue>(context_.get_executor())),
        registry_(std::make_shared<kit::OperationRegistry>(deadlines_, 1U << 20)) {
    host->operations = registry_;
  }

  Side(const Side&) = delete;
  Side& operator=(const Side&) = delete;
  /// Ends what is left: an operation and the registry that it is in hold each other.
  ~Side() {
    protocol->fail(errc::closed, "the test ends");
    host->operations.reset();  // its timer goes before what it waits in
  }

  /// Starts a transfer of `objects`; the outcome is filled in when it ends.
  std::shared_ptr<kit::Operation> start(TransferRequest request, std::shared_ptr<Outcome> outcome) {
    outcome->statuses.resize(request.objects.size());
    request.statuses = outcome->statuses;
    request.diagnostic = &outcome->diagnostic;
    if (request.kind == TransferKind::recv) {
      outcome->sizes.resize(request.objects.size());
      request.sizes = outcome->sizes;
    }
    auto operation = std::make_shared<kit::Operation>(
        std::move(request), Completion::direct([outcome](std::error_code ec, std::size_t count) {
          ++outcome->calls;
          outcome->ec = ec;
          outcome->count = count;
        }),
        kit::Clock::now() + std::chrono::hours(1), registry_);
    (void)registry_->add(operation);
    operation->start_on(link_);
    return operation;
  }

  /// Ends an operation as a cancellation does.
  static void stop(kit::Operation& operation) { operation.request_stop(errc::cancelled); }

  [[nodiscard]] MutableBuffer page_at(std::size_t index, std::size_t size = page) {
    return {memory.data() + index * page, size};
  }

  /// Feeds bytes as a socket would, in reads of at most `step` bytes.
  [[nodiscard]] std::error_code feed(std::span<const std::byte> bytes, std::size_t step = std::size_t{256} << 10) {
    std::array<iovec, 64> pieces;
    while (!bytes.empty()) {
      std::size_t taken = 0;
      if (const std::size_t count = protocol->reader().prepare(pieces, step); count == 0) {
        taken = std::min({bytes.size(), step, protocol->reader().discardable()});
      } else {
        for (std::size_t i = 0; i < count && taken < std::min(bytes.size(), step); ++i) {
          const std::size_t part = std::min({pieces[i].iov_len, bytes.size() - taken, step - taken});
          std::memcpy(pieces[i].iov_base, bytes.data() + taken, part);
          taken += part;
        }
      }
      bytes = bytes.subspan(taken);
      if (const auto ec = protocol->received(taken)) {
        return ec;
      }
    }
    return {};
  }

  /// Takes at most `step` outgoing bytes.
  [[nodiscard]] std::vector<std::byte> take(std::size_t step) {
    std::array<iovec, 64> pieces;
    if (protocol->take_fence()) {
      host->when_writes_ended([this] { protocol->answer_fence(); });
    }
    protocol->fill(step);
    const std::size_t count = protocol->out().front(pieces, step);
    std::vector<std::byte> bytes;
    for (std::size_t i = 0; i < count; ++i) {
      const auto* data = static_cast<const std::byte*>(pieces[i].iov_base);
      bytes.insert(bytes.end(), data, data + pieces[i].iov_len);
    }
    protocol->sent(bytes.size());
    return bytes;
  }

  std::vector<std::byte> memory;
  std::shared_ptr<Host> host;
  std::unique_ptr<LaneProtocol> protocol;

 private:
  Side(std::vector<std::byte> block, std::shared_ptr<PeerMemory> peers)
      : Side(std::vector<MemoryRegion>{{block.data(), block.size(), page, Access::read_write},
                                       {block.data(), block.size(), page, Access::none}},
             std::move(peers)) {
    memory = std::move(block);  // which stays where it is
  }

  std::shared_ptr<SideLink> link_;
  asio::io_context context_;
  std::shared_ptr<kit::DeadlineQueue> deadlines_;
  std::shared_ptr<kit::OperationRegistry> registry_;
};

/// Moves bytes both ways until neither side has anything to send. @return the first violation.
inline std::error_code settle(Side& a, Side& b, std::size_t step = std::size_t{256} << 10) {
  for (;;) {
    const auto to_b = a.take(step);
    const auto to_a = b.take(step);
    if (to_b.empty() && to_a.empty()) {
      return {};
    }
    if (const auto ec = b.feed(to_b, step)) {
      return ec;
    }
    if (const auto ec = a.feed(to_a, step)) {
      return ec;
    }
  }
}

/// A frame as a hostile peer might send it.
inline std::vector<std::byte> frame_bytes(const FrameHeader& header, std::span<const Descriptor> descriptors = {},
                                          std::span<const std::byte> payload = {}) {
  std::vector<std::byte> bytes(sizeof(header) + descriptors.size_bytes());
  std::memcpy(bytes.data(), &header, sizeof(header));
  std::ranges::copy(std::as_bytes(descriptors), bytes.begin() + sizeof(header));
  bytes.insert(bytes.end(), payload.begin(), payload.end());
  if (has_trailer(header)) {
    bytes.resize(bytes.size() + sizeof(FrameTrailer));
  }
  return bytes;
}

}  // namespace kvferry::tcp::testing
