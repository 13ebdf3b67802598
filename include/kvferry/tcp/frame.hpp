// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/kit/region_table.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

// Structures travel as they lie in memory. A big-endian port would have to swap here.
static_assert(std::endian::native == std::endian::little, "kvferry's TCP frames are little-endian");

/// The frames on a data connection after the hello. docs/wire_protocol.md has the meaning of every field.
enum class FrameType : std::uint8_t {
  write = 1,
  write_ack,
  notify,
  read,
  read_data,
  recv_post,
  recv_cancel,
  send_data,
  send_ack,
  send_abort,
  probe,
  probe_answer,
  fence,
  fence_ack,
  region_added,
  region_removed,
  region_removed_ack,
  region_shared,
  region_mapped,
};

struct FrameHeader {
  static constexpr std::uint32_t expected_magic = 0x3346564b;  // "KVF3"
  /// write, read, send_data: the operation's last one.
  static constexpr std::uint8_t last_chunk = 1;
  /// write_ack: the data is in memory, but the queue of notifications was full.
  static constexpr std::uint8_t notification_refused = 2;
  /// write, read: the descriptors are `RangeDescriptor`s, and those that need one are followed by a `BlockDescriptor`.
  static constexpr std::uint8_t ranges = 4;
  /// read, recv_post: the bytes are to come with checksums.
  static constexpr std::uint8_t with_checksums = 8;

  std::uint32_t magic = expected_magic;
  FrameType type = FrameType::write;
  std::uint8_t flags = 0;
  std::uint16_t checksums = 0;       ///< `Checksum`s behind the notification, if there is payload.
  std::uint64_t operation = 0;  ///< The id at the side that gave it: see the type. region_added, region_shared: the region's size.
  std::uint64_t tag =
      0;  ///< recv_post: the tag. send_data: the send's id. write, notify: the notification's key. region_added, region_shared: bytes of a page.
  std::uint32_t region = 0;  ///< write, read: the receiver's region. region_added, region_removed, region_shared: the sender's.
  std::uint32_t count = 0;           ///< Descriptors that follow.
  std::uint64_t payload_bytes = 0;   ///< Bytes that follow the descriptors; read: bytes asked for.
  std::uint64_t first_offset = 0;    ///< Where in the first descriptor's object or page its bytes begin.
  std::uint32_t status = 0;          ///< 0 or a kvferry::errc. region_added: the access. region_mapped: an errno.
  std::uint32_t notification_bytes = 0;  ///< write, notify: bytes that follow the payload.
  std::uint32_t references = 0;  ///< write, read_data, send_data: `Reference`s that stand for the payload. 0: it follows.
  std::uint32_t reserved2 = 0;
};
static_assert(sizeof(FrameHeader) == 64);

/// One object, or a part of one, in a frame.
struct Descriptor {
  /// send_data: the object does not fit the receiver's buffer; `length` is its size and none of its bytes follow.
  static constexpr std::uint64_t refused = std::uint64_t{1} << 63;
  /// send_data: more bytes of the object come with the next frame.
  static constexpr std::uint64_t continues = std::uint64_t{1} << 62;

  std::uint64_t index = 0;   ///< write, read: page. send_data: number of the object in the batch. region_shared: the file's inode.
  std::uint64_t length = 0;  ///< Bytes in this frame. recv_post: the buffer's size. region_shared: the address.
};
static_assert(sizeof(Descriptor) == 16);

/// write, read with `FrameHeader::ranges`: bytes of a region, end to end; or, with `blocks`, in blocks, of which the next
/// descriptor says more. So a range costs 16 or 32 bytes, however many blocks it has.
struct RangeDescriptor {
  static constexpr std::uint32_t blocks = std::uint32_t{1} << 31;

  std::uint64_t offset = 0;  ///< In the region.
  std::uint32_t length = 0;  ///< Bytes in this frame.
  std::uint32_t region = 0;  ///< The receiver's region; bit 31: `blocks`.
};
static_assert(sizeof(RangeDescriptor) == sizeof(Descriptor));

/// The bytes begin `skip` bytes behind the beginning of a block of `size` bytes at the range's offset, and go on in the
/// blocks that follow at every `stride` bytes.
struct BlockDescriptor {
  std::uint64_t stride = 0;
  std::uint32_t size = 0;
  std::uint32_t skip = 0;
};
static_assert(sizeof(BlockDescriptor) == sizeof(Descriptor));

/// Follows the descriptors if the receiver fetches the payload itself: bytes in the memory of the sender's process.
struct Reference {
  std::uint64_t address = 0;
  std::uint64_t length = 0;
};
static_assert(sizeof(Reference) == 16);

/// Ends a frame with payload, and tells whether the bytes before it are valid. A sender may find out that it can't read
/// a buffer when the frame's header has been sent already. It then fills the frame up and reports it here.
struct FrameTrailer {
  std::uint32_t status = 0;  ///< 0 or a kvferry::errc.
  std::uint32_t reserved = 0;
};
static_assert(sizeof(FrameTrailer) == 8);

/// Follows the payload: the checksum that the next `length` bytes of the payload have to have where they land. The
/// first one of a frame begins at the payload's first byte.
struct Checksum {
  std::uint64_t length = 0;
  std::uint64_t sum = 0;  ///< XXH3-64, without a seed.
};
static_assert(sizeof(Checksum) == 16);

[[nodiscard]] constexpr bool has_trailer(const FrameHeader& header) noexcept {
  return header.payload_bytes != 0 && header.type != FrameType::read;  // a read's bytes are asked for, not sent
}

/// A frame as received, but for its payload.
struct Frame {
  FrameHeader header;
  std::vector<Descriptor> descriptors;
  std::vector<Reference> references;
  std::vector<std::byte> notification;
  std::vector<Checksum> checksums;
  FrameTrailer trailer;
  bool unwritable = false;  ///< The memory that the payload was for can't be written.
  bool unreadable = false;  ///< The memory that the references name can't be read.
  bool hung_up = false;     ///< The peer had gone before all that the references name was here.
  bool overfull = false;    ///< There was no room for its descriptors; they have been thrown away.
};

// Bounds that both sides keep, so that each can hold the other to them.

/// Payload of one frame: small enough that many operations share a connection fairly, large enough that its header and
/// its acknowledgement don't count.
inline constexpr std::size_t max_chunk_bytes = std::size_t{1} << 20;
inline constexpr std::size_t max_chunk_objects = 1024;
/// The most objects that a sender puts into one frame: with its header, its notification and its trailer, as many
/// pieces as a call takes (IOV_MAX).
inline constexpr std::size_t sent_chunk_objects = max_chunk_objects - 3;
inline constexpr std::size_t max_notification_bytes = std::size_t{64} << 10;
/// IOV_MAX on Linux: as many as one call takes.
inline constexpr std::size_t max_references = 1024;
/// Frames sent that await an acknowledgement, and reads that await their data.
inline constexpr std::size_t max_unacknowledged = 1024;
inline constexpr std::size_t max_outstanding_reads = 64;
/// Probes that await their answer.
inline constexpr std::size_t max_outstanding_probes = 16;
/// Removals of regions that await their answer: of as many as there can be at a time, and before that of those that have
/// gone since the handshake.
inline constexpr std::size_t max_outstanding_removals = 2 * kit::RegionTable::max_regions + 1;

}  // namespace kvferry::tcp
