// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_TRANSFER_SPEC_HPP
#define KVFERRY_TRANSFER_SPEC_HPP

#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvferry::inline KVFERRY_ABI {

/// The longest id of a channel, in bytes.
inline constexpr std::size_t max_peer_id_bytes = 256;

using ConstBuffer = std::span<const std::byte>;
using MutableBuffer = std::span<std::byte>;

/// The objects of a batch: any range of things that convert to a buffer, or a braced list of buffers.
///
/// Only the descriptors (pointer and size) are copied, at the call; the bytes stay the caller's.
template <class Buffer>
class ObjectList {
 public:
  ObjectList() = default;
  ObjectList(std::initializer_list<Buffer> buffers) : buffers_(buffers) {}
  ObjectList(std::vector<Buffer>&& buffers) noexcept : buffers_(std::move(buffers)) {}

  template <std::ranges::input_range Range>
  requires(!std::same_as<std::remove_cvref_t<Range>, ObjectList> &&
           std::convertible_to<std::ranges::range_reference_t<Range>, Buffer>) ObjectList(Range&& range) {
    if constexpr (std::ranges::sized_range<Range>) {
      buffers_.reserve(std::ranges::size(range));
    }
    for (auto&& buffer : range) {
      buffers_.push_back(static_cast<Buffer>(buffer));
    }
  }

  [[nodiscard]] std::vector<Buffer>& buffers() noexcept { return buffers_; }
  [[nodiscard]] const std::vector<Buffer>& buffers() const noexcept { return buffers_; }

 private:
  std::vector<Buffer> buffers_;
};

/// Objects that are read from: those of send, write and get_local_mem_indices.
using ConstObjects = ObjectList<ConstBuffer>;
/// Objects that are written to: those of recv and read.
using MutableObjects = ObjectList<MutableBuffer>;

/// Where a batch goes or comes from, and what else the caller wants of it. LMCache: the `transfer_spec` dict.
///
/// `peer_id`, `remote_indexes` and `notification` are copied by the call, also with lazy tokens (`use_awaitable`,
/// `deferred`). What `statuses`, `sizes` and `diagnostic` point to is written until the completion.
struct TransferSpec {
  /// The peer, by the id given to `lazy_init_peer_connection`. LMCache: `receiver_id` / `sender_id`.
  std::string_view peer_id;

  /// Write and read: one page index in the peer's region for each object. LMCache: `remote_indexes`.
  std::span<const std::uint64_t> remote_indexes = {};

  /// Write and read: which of the peer's regions.
  std::uint32_t remote_region = 0;

  /// Send and recv: a send meets the recv of the same tag, in the order in which each side posted them.
  std::uint64_t tag = 0;

  /// How long the whole operation may take. Unset: the channel's default. Zero or less: it times out at once.
  std::optional<std::chrono::milliseconds> timeout = {};

  /// Write: handed to the peer's `receive_notification` once the whole batch is in its memory.
  std::span<const std::byte> notification = {};

  /// Optional, one for each object: success for those that were transferred, the cause for the others.
  std::span<std::error_code> statuses = {};

  /// Optional, recv only, one for each object: the bytes that arrived, which may be fewer than the buffer holds.
  std::span<std::size_t> sizes = {};

  /// Optional: on failure, a sentence that names the peer, the field and the values.
  std::string* diagnostic = nullptr;
};

/// What `lazy_init_peer_connection` and `send_init_side_msg` may be told besides their arguments.
struct InitSpec {
  /// How long the whole handshake may take: connect, exchange, data connections, side message. Unset: the channel's
  /// default.
  std::optional<std::chrono::milliseconds> timeout = {};

  /// Optional: on failure, a sentence that names the peer, the field and the values. Written until the completion.
  std::string* diagnostic = nullptr;
};

/// The four transfers.
enum class TransferKind : std::uint8_t { send, recv, write, read };

[[nodiscard]] constexpr std::string_view to_string(TransferKind kind) noexcept {
  switch (kind) {
    case TransferKind::send: return "send";
    case TransferKind::recv: return "recv";
    case TransferKind::write: return "write";
    case TransferKind::read: return "read";
  }
  return "transfer";
}

/// A transfer as a transport gets it: a `TransferSpec` and its objects that own their descriptors.
struct TransferRequest {
  TransferKind kind = TransferKind::write;
  std::string peer_id;
  /// Like an iovec, one type for both directions: the buffers of send and write are only ever read.
  std::vector<MutableBuffer> objects;
  std::vector<std::uint64_t> remote_indexes;
  std::uint32_t remote_region = 0;
  std::uint64_t tag = 0;
  std::optional<std::chrono::milliseconds> timeout;
  std::vector<std::byte> notification;
  std::span<std::error_code> statuses;
  std::span<std::size_t> sizes;
  std::string* diagnostic = nullptr;

  [[nodiscard]] bool one_sided() const noexcept { return kind == TransferKind::write || kind == TransferKind::read; }
};

/// What a peer attached to a write, received after the write's data is in this channel's memory.
struct Notification {
  std::string peer_id;
  std::vector<std::byte> payload;
  /// Of the peer that attached it, as in `PeerInfo`: tells what was written before the peer restarted from what came after.
  std::uint64_t incarnation = 0;
};

/// What a transport can do; known before any peer is. What it cannot do completes with `errc::not_supported`.
struct Capabilities {
  bool send_recv = false;
  bool write = false;
  bool read = false;
  bool notifications = false;
  /// Whether objects may lie outside every region.
  bool unregistered_objects = false;
  std::size_t max_notification_bytes = 0;
};

}  // namespace kvferry

#endif  // KVFERRY_TRANSFER_SPEC_HPP
