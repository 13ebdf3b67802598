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
#include <kvferry/detail/process.hpp>
#include <kvferry/shm/mapped_file.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// The beginning of a side's file: its counts for the other side, which can't write there. The sent bytes lie behind
/// it, at `RingFile::words_bytes`. Counts begin at 0 and never wrap. Each is on cache lines of its own.
struct RingWords {
  alignas(128) std::uint64_t sent;   ///< Bytes that this side has put into its ring.
  alignas(128) std::uint64_t taken;  ///< Bytes that it has taken out of the other side's.
  alignas(128) std::uint64_t waiting;  ///< 0: it polls. Else it waits for a bell: a new number for each wait, odd if
                                       ///< also for room.
  alignas(128) std::uint64_t state;    ///< Of `RingState`, or'ed.
};

/// The facts that a side tells about the memory that it refers to.
struct RingState {
  static constexpr std::uint64_t tells = 1;   ///< It tells the rest here. Without, its connection alone does.
  static constexpr std::uint64_t over = 2;    ///< It may change that memory from now on.
  static constexpr std::uint64_t forked = 4;  ///< A child of its process may share that memory.
};

/// A file in memory with this side's half of a connection's rings, mapped for writing here and nowhere else.
class RingFile {
 public:
  static constexpr std::size_t words_bytes = 4096;
  static constexpr std::size_t ring_bytes = std::size_t{64} << 10;
  static constexpr std::size_t bytes = words_bytes + ring_bytes;
  static_assert(sizeof(RingWords) <= words_bytes);

  RingFile() = default;
  RingFile(RingFile&& other) noexcept
      : origin_(other.origin_), data_(std::exchange(other.data_, nullptr)), inode_(other.inode_) {}
  RingFile& operator=(RingFile&& other) noexcept {
    std::swap(origin_, other.origin_);
    std::swap(data_, other.data_);
    std::swap(inode_, other.inode_);
    return *this;
  }
  ~RingFile();

  /// Makes a file with all of its memory, sealed as `MappedFile` requires.
  /// @param file gets the descriptor to pass to the other side.
  /// @return an errno.
  [[nodiscard]] static int make(RingFile& made, Descriptor& file);
  /// Whether a file that a peer has passed can be its half: it isn't this file, and has the right size.
  [[nodiscard]] bool fits(int peers_file) const noexcept;

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  /// Whether this process has forked a child that may share memory with it (`RingState::forked`).
  [[nodiscard]] static bool process_has_forked() noexcept;

 private:
  ProcessOfOrigin origin_;  ///< Of the mapping, which no child gets.
  std::byte* data_ = nullptr;
  std::uint64_t inode_ = 0;
};

/// Carries a connection's bytes through memory that both processes map: a ring for each direction, in the file of the
/// sending side. Each word of the peer's file is read once and checked against the ring's size. Bytes are copied out
/// before they are parsed.
///
/// No call waits. A thread that is going to wait announces it (`may_wait`). The other side then has to ring a bell,
/// once, when there is something (`bell_due`). The owner of the rings rings it.
///
/// Thread safety: one thread at a time on either side.
class ByteRings {
 public:
  /// @param own, peers the two files' memory, `RingFile::bytes` each; it must outlive this.
  ByteRings(std::byte* own, const std::byte* peers) noexcept;
  ByteRings(RingFile own, MappedFile peers) noexcept;

  /// As sendmsg(2). EAGAIN: the ring is full. `tcp::senseless_peer`: the peer's file has impossible counts. The memory
  /// of `pieces` must be mapped.
  [[nodiscard]] ssize_t send(std::span<const iovec> pieces) noexcept;
  /// The same, for memory that may be missing: the kernel copies. EFAULT: the first byte's memory is missing. EINTR:
  /// the kernel doesn't copy any more. Only if `kernel_copies`.
  [[nodiscard]] ssize_t send_payload(std::span<const iovec> pieces) noexcept;
  /// Whether the kernel can copy between this process's memory and its ring, by process_vm_writev(2).
  [[nodiscard]] bool kernel_copies() const noexcept { return kernel_copies_; }
  /// How many of `wanted` bytes `send` would take, or more. `send` reports impossible counts in the peer's file.
  [[nodiscard]] std::size_t room(std::size_t wanted) noexcept;
  /// As recvmsg(2), likewise. EAGAIN: the ring is empty.
  [[nodiscard]] ssize_t receive(std::span<const iovec> pieces) noexcept;
  /// The same, to memory that may be missing: the kernel copies. EFAULT: the first byte's memory is missing.
  [[nodiscard]] ssize_t receive_payload(std::span<const iovec> pieces) noexcept;
  [[nodiscard]] bool has_bytes() const noexcept;
  /// Called when the peer has gone: bytes that it puts into its ring later are ignored.
  void end() noexcept { last_sent_ = peers_sent(); }
  /// Tells the peer that what it copies from now on doesn't count. From any thread.
  void say_over() noexcept;
  /// The peer's present `RingState`. Bytes that were copied before the call were copied before the peer told more.
  [[nodiscard]] std::uint64_t peers_state() const noexcept;
  /// Whether a descriptor is kept.
  [[nodiscard]] bool by_file() const noexcept { return peers_file_.descriptor() != -1; }
  /// Whether the peer waits for the bytes that were just sent, or the room that was just made, and needs a bell.
  [[nodiscard]] bool bell_due() noexcept;

  /// Announces that this side is about to wait for the bell: for bytes, and, with `for_room`, for room.
  /// @return false if there are bytes or room already; then nothing is announced.
  [[nodiscard]] bool may_wait(bool for_room) noexcept;
  /// Withdraws the announcement: this side polls again. A bell may still come.
  void waits_no_more() noexcept;

 private:
  /// @return the free bytes; nothing, with errno set, as `send`.
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
