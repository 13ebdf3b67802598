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

/// The objects of a batch: any range of elements that convert to a buffer, or a braced list of buffers.
///
/// The call copies only the descriptors (pointer and size). The bytes stay the caller's.
template <class Buffer>
class ObjectList {
 public:
  ObjectList() = default;
  ObjectList(std::initializer_list<Buffer> buffers) : buffers_(buffers) {}
  ObjectList(std::vector<Buffer>&& buffers) noexcept : buffers_(std::move(buffers)) {}

  template <std::ranges::input_range Range>
  requires(!std::same_as<std::remove_cvref_t<Range>, ObjectList> &&
           // NOLINTNEXTLINE(bugprone-forwarding-reference-overload): not for itself
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

/// Bytes of a peer's region, by offset: `count` blocks of `size` bytes, each beginning `stride` bytes after the one before.
///
/// A range stands for the bytes of its blocks, one block behind the other. With `count` 1 the stride has no meaning. With
/// more, `stride` is at least `size`: blocks do not overlap. A range with `size` or `count` 0 has no bytes; its offset
/// must still lie in the region, or at its end. No sum or product of these numbers may exceed 64 bits.
struct RemoteRange {
  std::uint32_t region = 0;  ///< Which of the peer's regions.
  std::uint64_t offset = 0;  ///< Bytes, from the region's beginning to the first block's.
  std::uint64_t size = 0;    ///< Bytes of a block.
  std::uint64_t stride = 0;  ///< Bytes, from the beginning of a block to the next one's.
  std::uint64_t count = 1;   ///< Blocks.

  /// Bytes that lie end to end.
  [[nodiscard]] static constexpr RemoteRange contiguous(std::uint32_t region, std::uint64_t offset,
                                                        std::uint64_t size) noexcept {
    return {region, offset, size, 0, 1};
  }
  /// Blocks at equal distances: the heads of one rank in a page of tokens, the same page of each layer.
  [[nodiscard]] static constexpr RemoteRange strided(std::uint32_t region, std::uint64_t offset,
                                                     std::uint64_t block_size, std::uint64_t stride,
                                                     std::uint64_t count) noexcept {
    return {region, offset, block_size, stride, count};
  }

  friend bool operator==(const RemoteRange&, const RemoteRange&) = default;
};

/// Picks an object's bytes out of its buffer: blocks of `block_size` bytes, each beginning `stride` bytes after the one
/// before. The buffer reaches from the first block's first byte to the last block's last one. Bytes between the blocks
/// are neither read nor written. Over RDMA, an object outside of all regions is registered as a whole for the
/// operation. So the memory between its blocks has to be mapped with the same rights, and counts for the limit of
/// locked memory.
///
/// `block_size` 0: the whole buffer. A buffer of one block needs no stride. With more blocks, `stride` is at least
/// `block_size`. An empty buffer is an empty object.
struct LocalStride {
  std::size_t block_size = 0;  ///< Bytes.
  std::size_t stride = 0;      ///< Bytes.

  friend bool operator==(const LocalStride&, const LocalStride&) = default;
};

/// The peer, the places and the options of a batch. LMCache: the `transfer_spec` dict.
///
/// The call copies `peer_id`, `remote_indexes`, `remote_ranges`, `local_strides` and `notification`, also with lazy
/// tokens (`use_awaitable`, `deferred`). `statuses`, `sizes` and `diagnostic` are written until the completion: keep
/// their targets valid until then.
struct TransferSpec {
  /// The peer, by the id given to `lazy_init_peer_connection`. LMCache: `receiver_id` / `sender_id`.
  std::string_view peer_id;

  /// Write and read: one page index in the peer's region for each object. LMCache: `remote_indexes`.
  std::span<const std::uint64_t> remote_indexes = {};

  /// Write and read: the number of the peer's region for `remote_indexes`.
  std::uint32_t remote_region = 0;

  /// Write and read, instead of `remote_indexes` and `remote_region`: one range of the peer's bytes for each object, in
  /// any of its regions. Range i has as many bytes as object i. Both are sequences of bytes: their blocks need not have
  /// the same size. Page sizes do not matter. If ranges of a write overlap within one region, the last one's bytes are
  /// there at the end. Nothing is promised for regions that share memory. Needs `Capabilities::ranges`. Errors:
  /// `errc::count_mismatch`, `errc::invalid_range` (also if there are indexes as well), `errc::range_out_of_bounds`,
  /// `errc::unknown_region`, `errc::access_denied`.
  std::span<const RemoteRange> remote_ranges = {};

  /// Write and read, with ranges or with page indexes: empty, or one for each object. Needs `Capabilities::ranges`. Errors:
  /// `errc::count_mismatch`, `errc::invalid_range`.
  std::span<const LocalStride> local_strides = {};

  /// The incarnation of the peer for which the operation is meant: the value of the peer's own
  /// `BaseTransferChannel::incarnation`, of `PeerInfo` or of `Notification`. If another incarnation is connected, or
  /// answers a reconnect, the operation ends with `errc::peer_restarted`. Set it if the peer sends its incarnation
  /// along with the indexes or ranges: the operation is then safe even if this side hasn't noticed a restart yet. 0:
  /// the incarnation that this side knows.
  std::uint64_t incarnation = 0;

  /// Send and recv: a send meets the recv with the same tag, in the order in which each side posted them.
  std::uint64_t tag = 0;

  /// How long the whole operation may take. Unset: the channel's default. Zero or less: it times out at once.
  std::optional<std::chrono::milliseconds> timeout = {};

  /// Bytes for the peer's user. Write: handed out once the whole batch is in the peer's memory. Read: handed out once
  /// the whole batch is in this side's memory; not at all if any object fails. `notify` is an empty batch with a
  /// notification.
  std::span<const std::byte> notification = {};

  /// With key 0 the peer's `receive_notification` gets the notification; with another key, its `receive_notifications`
  /// for that key. Only with a notification.
  std::uint64_t notification_key = 0;

  /// Whether the objects have checksums: the source computes them, and the destination compares them with the bytes
  /// that have landed. Unset: as `ChannelOptions::checksums` says. A send and its recv have them if either side asks.
  /// Needs `Capabilities::checksums`. Over RDMA, the checksums of a write need a region that peers may also read. An
  /// object that differs ends with `errc::checksum_mismatch`: don't use the bytes at its destination.
  std::optional<bool> checksums = {};

  /// Optional, one for each object: success if it was transferred, else the cause.
  std::span<std::error_code> statuses = {};

  /// Optional, recv only, one for each object: the number of bytes that arrived, which may be smaller than the buffer.
  std::span<std::size_t> sizes = {};

  /// Optional: on failure, a sentence that names the peer, the field and the values.
  std::string* diagnostic = nullptr;
};

/// Options of `lazy_init_peer_connection` and `send_init_side_msg`.
struct InitSpec {
  /// How long the whole handshake may take: connect, exchange, data connections, side message. Unset: the channel's
  /// default.
  std::optional<std::chrono::milliseconds> timeout = {};

  /// Optional: on failure, a sentence that names the peer, the field and the values. Written until the completion.
  std::string* diagnostic = nullptr;
};

/// Options of `notify`.
struct NotifySpec {
  /// As `TransferSpec::notification_key`.
  std::uint64_t key = 0;

  /// How long the notification may take to reach the peer's queue. Unset: the channel's default. Zero or less: it times
  /// out at once.
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

/// A transfer as a transport gets it: a `TransferSpec` and objects, which own their descriptors.
struct TransferRequest {
  TransferKind kind = TransferKind::write;
  std::string peer_id;
  /// One type for both directions, like an iovec. The buffers of send and write are only read.
  std::vector<MutableBuffer> objects;
  std::vector<std::uint64_t> remote_indexes;
  std::uint32_t remote_region = 0;
  std::vector<RemoteRange> remote_ranges;
  std::vector<LocalStride> local_strides;
  std::uint64_t incarnation = 0;  ///< Unless 0, the peer's incarnation for which it is meant.
  std::uint64_t tag = 0;
  std::optional<std::chrono::milliseconds> timeout;
  std::vector<std::byte> notification;
  std::uint64_t notification_key = 0;
  std::optional<bool> checksums;  ///< Unset: as the channel's options say.
  std::span<std::error_code> statuses;
  std::span<std::size_t> sizes;
  std::string* diagnostic = nullptr;

  [[nodiscard]] bool one_sided() const noexcept { return kind == TransferKind::write || kind == TransferKind::read; }
};

/// Bytes that a peer attached to a write or read, or sent alone. A write's notification comes after the write's data is
/// in this channel's memory, a read's after the read has succeeded.
struct Notification {
  std::string peer_id;
  std::vector<std::byte> payload;
  /// The incarnation of the peer that sent it, as in `PeerInfo`. It tells writes before a restart of the peer from
  /// later ones.
  std::uint64_t incarnation = 0;
  std::uint64_t key = 0;  ///< `TransferSpec::notification_key`.
};

/// A wait for several notifications of one key, as a transport gets it.
struct NotificationsRequest {
  std::uint64_t key = 0;
  std::size_t count = 0;
  std::optional<std::chrono::milliseconds> timeout;
};

/// The operations that a transport supports, whatever the peers. Other operations complete with `errc::not_supported`.
struct Capabilities {
  bool send_recv = false;
  bool write = false;
  bool read = false;
  bool notifications = false;
  /// Whether writes and reads take `TransferSpec::remote_ranges` and `local_strides`.
  bool ranges = false;
  /// Whether objects may lie outside every region.
  bool unregistered_objects = false;
  /// Whether there are `ChannelOptions::checksums` and `TransferSpec::checksums`.
  bool checksums = false;
  /// Whether there are `BaseTransferChannel::add_region` and `remove_region`.
  bool region_changes = false;
  std::size_t max_notification_bytes = 0;
};

}  // namespace kvferry

#endif  // KVFERRY_TRANSFER_SPEC_HPP
