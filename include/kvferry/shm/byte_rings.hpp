// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>

#include <kvferry/config.hpp>
#include <kvferry/detail/descriptor.hpp>
#include <kvferry/shm/mapped_file.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// The beginning of a side's file: what it tells the other one, who can't write there. The bytes that it sends lie behind, at
/// `RingFile::words_bytes`. Counts begin at 0 and never wrap. Each is on cache lines of its own.
struct RingWords {
  alignas(128) std::uint64_t sent;   ///< Bytes that this side has put into its ring.
  alignas(128) std::uint64_t taken;  ///< Bytes that it has taken out of the other side's.
  alignas(128) std::uint64_t waiting;  ///< 0: it looks by itself. Else it waits for a bell: another number for each wait, odd if for room, too.
};

/// A file in memory with this side's half of a connection's rings, mapped for writing here and nowhere else.
class RingFile {
 public:
  static constexpr std::size_t words_bytes = 4096;
  static constexpr std::size_t ring_bytes = std::size_t{64} << 10;
  static constexpr std::size_t bytes = words_bytes + ring_bytes;
  static_assert(sizeof(RingWords) <= words_bytes);

  RingFile() = default;
  RingFile(RingFile&& other) noexcept : data_(std::exchange(other.data_, nullptr)), inode_(other.inode_) {}
  RingFile& operator=(RingFile&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(inode_, other.inode_);
    return *this;
  }
  ~RingFile();

  /// Makes one with all of its memory, sealed as `MappedFile` wants it. @param file what the other side is to be passed.
  /// @return an errno.
  [[nodiscard]] static int make(RingFile& made, Descriptor& file);
  /// Whether a file that a peer has passed can be its half, rather than this one or what would take more memory to map.
  [[nodiscard]] bool fits(int peers_file) const noexcept;

  [[nodiscard]] std::byte* data() const noexcept { return data_; }

 private:
  std::byte* data_ = nullptr;
  std::uint64_t inode_ = 0;
};

/// A connection's bytes, through memory that both processes map: a ring for each direction, in the file of the side that sends.
/// Of what the peer's file says each word is read once, and measured against the ring; bytes are copied out before anybody looks
/// at them.
///
/// No call waits. Whoever wants to wait says so (`may_wait`); the other side then has a bell to ring, once, when there is
/// something (`bell_due`). How it rings is not these rings' business.
///
/// Thread safety: one thread at a time on either side.
class ByteRings {
 public:
  /// @param own, peers of `RingFile::bytes`, and there for as long as this is.
  ByteRings(std::byte* own, const std::byte* peers) noexcept;
  ByteRings(RingFile own, MappedFile peers) noexcept;

  /// As sendmsg(2). EAGAIN: the ring is full. `tcp::senseless_peer`: the peer's file says what can't be. The memory of `pieces` has to be there.
  [[nodiscard]] ssize_t send(std::span<const iovec> pieces) noexcept;
  /// The same, of memory that may be gone: the kernel copies. EFAULT: the first byte's is. EINTR: it doesn't copy any more. Only
  /// where `kernel_copies`.
  [[nodiscard]] ssize_t send_payload(std::span<const iovec> pieces) noexcept;
  /// Whether the kernel lets this process have it copy between its own memory and its ring.
  [[nodiscard]] bool kernel_copies() const noexcept { return kernel_copies_; }
  /// How many of `wanted` bytes `send` would take, or more. Where the peer's file says what can't be, `send` is to find that out.
  [[nodiscard]] std::size_t room(std::size_t wanted) noexcept;
  /// As recvmsg(2), likewise. EAGAIN: the ring is empty.
  [[nodiscard]] ssize_t receive(std::span<const iovec> pieces) noexcept;
  /// The same, to memory that may be gone: the kernel copies. EFAULT: the first byte's is.
  [[nodiscard]] ssize_t receive_payload(std::span<const iovec> pieces) noexcept;
  [[nodiscard]] bool has_bytes() const noexcept;
  /// The peer has gone: what it puts into its ring from here on doesn't count.
  void end() noexcept { last_sent_ = peers_sent(); }
  /// Whether a descriptor is kept.
  [[nodiscard]] bool by_file() const noexcept { return peers_file_.descriptor() != -1; }
  /// Whether the peer waits for what was just sent or received, and is to hear a bell.
  [[nodiscard]] bool bell_due() noexcept;

  /// Says that this side is about to wait for the bell: for bytes, and `for_room`. @return false if there are some already; then it has
  /// said nothing.
  [[nodiscard]] bool may_wait(bool for_room) noexcept;
  /// It looks by itself again. A bell that was about to ring may still come.
  void waits_no_more() noexcept;

 private:
  /// @return bytes that there is room for; nothing, with errno set, as `send`.
  [[nodiscard]] std::optional<std::size_t> room_for(std::uint64_t wanted) noexcept;
  [[nodiscard]] std::uint64_t peers_sent() const noexcept;

  RingFile own_file_;
  MappedFile peers_file_;
  std::byte* const own_;
  const std::byte* const peers_;
  std::uint64_t sent_ = 0;
  std::uint64_t taken_ = 0;
  std::uint64_t peer_sent_ = 0;   ///< As read last, and found to be possible.
  std::uint64_t peer_taken_ = 0;  ///< Likewise.
  std::uint64_t waiting_ = 0;
  std::uint64_t waits_ = 0;
  std::uint64_t rung_for_ = 0;  ///< Which wait of the peer's.
  std::optional<std::uint64_t> last_sent_;  ///< See `end`.
  bool kernel_copies_ = false;
};

}  // namespace kvferry::shm
