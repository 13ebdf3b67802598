// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {

// Structures travel as they lie in memory. A big-endian port would have to swap here.
static_assert(std::endian::native == std::endian::little, "kvferry's RDMA messages are little-endian");

/// The messages that travel by SEND. docs/wire_protocol.md has the meaning of every field.
enum class MessageType : std::uint8_t {
  hello = 1,
  welcome,
  credit,
  goodbye,
  notify,
  notify_ack,
  recv_post,
  recv_cancel,
  recv_cancel_ack,
  send_data,
  send_ack,
  send_abort,
  fence,
  fence_ack,
  region_added,
  region_removed,
  region_removed_ack,
  regions_question,
  regions_answer,
  check_memory,
  check_recv,
  check_answer,
};

struct MessageHeader {
  static constexpr std::uint32_t expected_magic = 0x3152564b;  // "KVR1"
  /// notify, recv_post, send_data: the last message of its operation. region_added: of the link's last rail.
  static constexpr std::uint8_t last = 1;
  /// recv_post, send_data: the objects have checksums. check_memory: bytes were written there; else they were read.
  static constexpr std::uint8_t checked = 2;

  std::uint32_t magic = expected_magic;
  MessageType type = MessageType::hello;
  std::uint8_t flags = 0;
  std::uint16_t credits = 0;     ///< Receive buffers that the sender has posted anew since it last said so.
  /// recv_post, send_data: entries in the body. region_added: keys in it. send_abort: the send's objects. check_memory,
  /// check_recv: checksums in it; check_answer: in the question.
  std::uint32_t count = 0;
  std::uint32_t body_bytes = 0;  ///< Bytes that follow.
  /// The id at the side that gave it: see the type. hello, welcome: the incarnation. region_*: the region.
  std::uint64_t operation = 0;
  /// recv_post, recv_cancel: the tag. send_data: the send's id; send_abort: too, if it is to be answered. hello, welcome:
  /// the rail. notify: its key. region_added: the region's bytes. check_recv: the recv. check_answer: see `first`.
  std::uint64_t tag = 0;
  /// recv_post: number of the first object in the body. notify: of the first byte. region_added: the rail of the keys.
  /// check_answer: a bit for each of the first 64 checksums, set where the bytes differ; those of the others in `tag`.
  std::uint64_t first = 0;
  std::uint32_t status = 0;  ///< 0 or a kvferry::errc. region_added: the region's access.
  std::uint32_t total = 0;   ///< recv_post: objects. notify: bytes. Of all messages of the operation.
};
static_assert(sizeof(MessageHeader) == 48);

/// A buffer of a recv: recv_post.
struct PostedBuffer {
  std::uint64_t size = 0;
  std::uint64_t address = 0;  ///< If the sender may write into it directly.
  std::uint32_t key = 0;
  std::uint32_t direct = 0;  ///< 1 if it may.
};
static_assert(sizeof(PostedBuffer) == 24);

/// The body of region_added begins with it; the keys follow.
struct AddedRegion {
  std::uint64_t address = 0;
  std::uint64_t slice_bytes = 0;
  std::uint64_t page_size = 0;
};
static_assert(sizeof(AddedRegion) == 24);

/// A checksum of bytes that lie in a region of the receiver's: check_memory. `count` blocks, at most `max_part_bytes` in all.
struct CheckedRange {
  std::uint64_t offset = 0;
  std::uint64_t size = 0;    ///< Of a block.
  std::uint64_t stride = 0;  ///< From the beginning of a block to the next one's.
  std::uint32_t region = 0;
  std::uint32_t count = 0;
  std::uint64_t sum = 0;  ///< Their XXH3-64.
};
static_assert(sizeof(CheckedRange) == 40);

/// A checksum of the next bytes of a recv's object: check_recv.
struct CheckedPart {
  std::uint64_t length = 0;
  std::uint64_t sum = 0;
};
static_assert(sizeof(CheckedPart) == 16);

/// Comes before each object of send_data: the number of its bytes in this message, and flags.
struct SentObject {
  /// None of its bytes follow: it does not fit the buffer; the length is its size.
  static constexpr std::uint64_t refused = std::uint64_t{1} << 63;
  /// None of its bytes follow: all of them have been written into the buffer.
  static constexpr std::uint64_t direct = std::uint64_t{1} << 62;
  /// More bytes of it come in the next message.
  static constexpr std::uint64_t continues = std::uint64_t{1} << 61;
  static constexpr std::uint64_t length_mask = continues - 1;
};

// Bounds of receive buffers, which both sides keep, so that each can hold the other to them.
inline constexpr std::size_t min_message_bytes = 1024;
inline constexpr std::size_t max_message_bytes = std::size_t{64} << 10;
inline constexpr std::size_t min_messages = 8;
inline constexpr std::size_t max_messages = 4096;
/// Keys that the smallest receive buffer holds: the slices of a region that comes later.
inline constexpr std::size_t max_region_keys =
    (min_message_bytes - sizeof(MessageHeader) - sizeof(AddedRegion)) / sizeof(std::uint32_t);
/// Of them, those that are posted at first. With fewer, credits would go back and forth without end.
inline constexpr std::size_t min_first_messages = 4;
/// The values that this implementation uses: receive buffers, and places to send messages from. There are few of either at first,
/// and more once a connection needs them.
inline constexpr std::size_t message_bytes = 8192;
inline constexpr std::size_t first_messages = 4;
inline constexpr std::size_t messages = 64;
inline constexpr std::size_t first_slots = 4;
inline constexpr std::size_t most_slots = 32;

inline constexpr std::size_t max_notification_bytes = std::size_t{64} << 10;
/// Bytes that a checksum covers at most: larger objects have several.
inline constexpr std::uint64_t max_part_bytes = std::uint64_t{1} << 20;
inline constexpr std::uint64_t max_part_blocks = 4096;
/// Bounds of a message with checksums: an answer has a bit for each of them, and others have their turn in between.
inline constexpr std::size_t max_checked_parts = 128;
inline constexpr std::uint64_t max_checked_bytes = std::uint64_t{16} << 20;
/// Messages with checksums that a side takes before it has answered them.
inline constexpr std::size_t max_checks = 4;
/// Answers that wait for their turn because the peer takes no messages; a peer that causes more of them breaks the
/// connection.
inline constexpr std::size_t max_queued_answers = 4096;

}  // namespace kvferry::rdma
