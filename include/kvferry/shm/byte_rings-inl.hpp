// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/shm/byte_rings.hpp>

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include <kvferry/detail/process.hpp>
#include <kvferry/detail/thread.hpp>
#include <kvferry/shm/pieces.hpp>
#include <kvferry/shm/shared_areas.hpp>
#include <kvferry/tcp/socket.hpp>

#if defined(__SANITIZE_THREAD__)
#define KVFERRY_THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define KVFERRY_THREAD_SANITIZER 1
#endif
#endif

#ifdef KVFERRY_THREAD_SANITIZER
extern "C" void __tsan_acquire(void* address);  // NOLINT(bugprone-reserved-identifier): its name
extern "C" void __tsan_release(void* address);  // NOLINT(bugprone-reserved-identifier): its name
#endif

namespace kvferry::inline KVFERRY_ABI::shm {
inline namespace internal {

static_assert(std::atomic_ref<std::uint64_t>::is_always_lock_free, "two processes share no lock");

/// Where the peer that waits for room is rung for: the reader goes on until the ring is empty, and so comes past it.
inline constexpr std::uint64_t room_worth_a_bell = RingFile::ring_bytes / 2;

/// Of a long copy so much at a time is the other side's to deal with meanwhile.
inline constexpr std::size_t part_bytes = 8192;

KVFERRY_INLINE RingWords& words_of(std::byte* file) noexcept { return *reinterpret_cast<RingWords*>(file); }

#ifdef KVFERRY_THREAD_SANITIZER
/// Where both sides are in one process, the sanitizer doesn't know that their mappings are the same memory, and so not what one
/// side's stores and the other's loads order. It is told by places that stand for files.
KVFERRY_INLINE std::array<char, 1024> places_of_files;
KVFERRY_INLINE std::atomic<std::uint64_t> files_made{0};

KVFERRY_INLINE void* place_of(const std::byte* file) noexcept {
  std::uint64_t number = 0;
  std::memcpy(&number, file + sizeof(RingWords), sizeof(number));
  return &places_of_files[number % places_of_files.size()];
}
#endif

KVFERRY_INLINE std::uint64_t bytes_of(std::span<const iovec> pieces) noexcept {
  std::uint64_t bytes = 0;
  for (const iovec& piece : pieces) {
    bytes += piece.iov_len;
  }
  return bytes;
}

/// A word of the peer's, which this process can't write to.
KVFERRY_INLINE std::uint64_t load(const std::byte* file, std::uint64_t RingWords::*word) noexcept {
  auto& words = words_of(const_cast<std::byte*>(file));
  const std::uint64_t value = std::atomic_ref(words.*word).load(std::memory_order_seq_cst);
#ifdef KVFERRY_THREAD_SANITIZER
  __tsan_acquire(place_of(file));
#endif
  return value;
}

KVFERRY_INLINE void store(std::byte* file, std::uint64_t RingWords::*word, std::uint64_t value) noexcept {
#ifdef KVFERRY_THREAD_SANITIZER
  __tsan_release(place_of(file));
#endif
  std::atomic_ref(words_of(file).*word).store(value, std::memory_order_seq_cst);
}

/// Doesn't return before later stores of this thread, and of those that it tells, come behind it in the other process as well.
KVFERRY_INLINE void say_state(std::byte* file, std::uint64_t state) noexcept {
#ifdef KVFERRY_THREAD_SANITIZER
  __tsan_release(place_of(file));
#endif
  std::atomic_ref(words_of(file).state).fetch_or(state, std::memory_order_seq_cst);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

/// The files of this process's rings.
struct RingFiles {
  std::mutex mutex;
  std::vector<std::byte*> files;
};
KVFERRY_INLINE constinit PerProcess<RingFiles> ring_files;
KVFERRY_INLINE std::atomic<bool> has_forked{false};

KVFERRY_INLINE void say_forked() noexcept {
  try {
    if (SharedAreas::of_process().ever()) {
      has_forked.store(true);
    }
    RingFiles* const rings = ring_files.if_here();
    if (rings == nullptr) {
      return;
    }
    // Also of a process that shares no memory yet: the child holds these connections, for what may be shared later.
    const std::lock_guard lock(rings->mutex);
    for (std::byte* const file : rings->files) {
      say_state(file, RingState::forked);
    }
  } catch (const std::bad_alloc&) {
    // There are no areas, or no files.
  }
}

/// Before a child exists that shares memory of this process's, and once more behind, as another thread may have made some in between.
/// To the child, that is memory like any other: it begins anew.
KVFERRY_INLINE const bool forks_are_said = pthread_atfork(say_forked, say_forked, [] { has_forked.store(false); }) == 0;

/// Copies between a ring, from `at` on, and as much of `pieces` as `left` bytes are. @param say gets how far it has come.
template <class Copy, class Say>
std::size_t go_round(std::uint64_t at, std::uint64_t left, std::span<const iovec> pieces, Copy copy, Say say) noexcept {
  std::size_t done = 0;
  std::size_t said = 0;
  for (const iovec& piece : pieces) {
    auto* memory = static_cast<std::byte*>(piece.iov_base);
    for (std::size_t rest = piece.iov_len; rest != 0 && left != 0;) {
      const auto offset = static_cast<std::size_t>(at % RingFile::ring_bytes);
      const auto part =
          static_cast<std::size_t>(std::min<std::uint64_t>({rest, left, RingFile::ring_bytes - offset, part_bytes}));
      copy(RingFile::words_bytes + offset, memory, part);
      memory += part;
      rest -= part;
      left -= part;
      at += part;
      done += part;
      if (done - said >= part_bytes) {
        said = done;
        say(at);
      }
    }
  }
  if (done != said) {
    say(at);
  }
  return done;
}

}  // namespace internal

KVFERRY_INLINE RingFile::~RingFile() {
  if (data_ == nullptr || origin_.was_forked()) {
    return;  // a child has other memory there by now, or none
  }
  if (RingFiles* const rings = ring_files.if_here()) {
    const std::lock_guard lock(rings->mutex);
    std::erase(rings->files, data_);
  }
  ::munmap(data_, bytes);
}

KVFERRY_INLINE bool RingFile::process_has_forked() noexcept { return has_forked.load() || !forks_are_said; }

KVFERRY_INLINE int RingFile::make(RingFile& made, Descriptor& file) {
  Descriptor opened(::memfd_create("kvferry ring", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!opened) {
    return errno;
  }
  // Beyond it the system sends a signal that ends the process.
  if (rlimit files{}; ::getrlimit(RLIMIT_FSIZE, &files) == 0 && bytes > files.rlim_cur) {
    return EFBIG;
  }
  if (::ftruncate(opened.get(), static_cast<off_t>(bytes)) != 0) {
    return errno;
  }
  const SignalsBlocked blocked;  // which would end the call
  if (const int error = ::posix_fallocate(opened.get(), 0, static_cast<off_t>(bytes))) {
    return error;
  }
  void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, opened.get(), 0);
  if (memory == MAP_FAILED) {
    return errno;
  }
  RingFile mapped;
  mapped.data_ = static_cast<std::byte*>(memory);
  struct stat status {};
  if (::fstat(opened.get(), &status) != 0) {
    return errno;
  }
  mapped.inode_ = status.st_ino;
#ifdef KVFERRY_THREAD_SANITIZER
  const std::uint64_t number = files_made.fetch_add(1);
  std::memcpy(mapped.data_ + sizeof(RingWords), &number, sizeof(number));
#endif
  // From here on nobody can map it for writing, or take any of it away.
  if (::fcntl(opened.get(), F_ADD_SEALS, MappedFile::seals) != 0) {
    return errno;
  }
  // A child of this process has no part in its connections.
  if (::madvise(memory, bytes, MADV_DONTFORK) != 0) {
    return errno;
  }
  (void)::madvise(memory, bytes, MADV_DONTDUMP);
  try {
    auto& [mutex, files] = ring_files.here();
    const std::lock_guard lock(mutex);
    files.push_back(mapped.data_);
    // A fork meanwhile finds it in the list, or is seen here.
    say_state(mapped.data_, RingState::tells | (process_has_forked() ? RingState::forked : 0));
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  }
  made = std::move(mapped);
  file = std::move(opened);
  return 0;
}

/// Once it has the seals that are looked for when it is mapped, its length stays. Of huge pages none has this length.
KVFERRY_INLINE bool RingFile::fits(int peers_file) const noexcept {
  struct stat status {};
  const int present = ::fcntl(peers_file, F_GET_SEALS);
  return present >= 0 && (present & MappedFile::seals) == MappedFile::seals && ::fstat(peers_file, &status) == 0 &&
         status.st_size == static_cast<off_t>(bytes) && (data_ == nullptr || status.st_ino != inode_);
}

KVFERRY_INLINE ByteRings::ByteRings(std::byte* own, const std::byte* peers) noexcept : own_(own), peers_(peers) {
  std::byte* const place = own + sizeof(RingWords);
  std::byte there = *place;
  const iovec from{&there, 1};
  const iovec to{place, 1};
  kernel_copies_ = ::process_vm_writev(::gettid(), &from, 1, &to, 1, 0) == 1;
}

KVFERRY_INLINE ByteRings::ByteRings(RingFile own, MappedFile peers) noexcept : ByteRings(own.data(), peers.data()) {
  own_file_ = std::move(own);
  peers_file_ = std::move(peers);
}

KVFERRY_INLINE std::optional<std::size_t> ByteRings::room_for(std::uint64_t wanted) noexcept {
  // The peer's word is read where what it said before isn't enough: its cache line is busy.
  if (RingFile::ring_bytes - (sent_ - peer_taken_) < wanted) {
    const std::uint64_t taken = load(peers_, &RingWords::taken);
    if (sent_ - taken > RingFile::ring_bytes) {
      errno = tcp::senseless_peer;
      return std::nullopt;
    }
    peer_taken_ = taken;
  }
  const auto room = static_cast<std::size_t>(RingFile::ring_bytes - (sent_ - peer_taken_));
  if (room == 0 && wanted != 0) {
    errno = EAGAIN;
    return std::nullopt;
  }
  return room;
}

KVFERRY_INLINE std::size_t ByteRings::room(std::size_t wanted) noexcept {
  const auto room = room_for(wanted);
  return room ? *room : errno == EAGAIN ? 0 : wanted;
}

KVFERRY_INLINE ssize_t ByteRings::send(std::span<const iovec> pieces) noexcept {
  const auto room = room_for(bytes_of(pieces));
  if (!room) {
    return -1;
  }
  const std::size_t copied = go_round(
      sent_, *room, pieces,
      [&](std::size_t place, const std::byte* from, std::size_t length) { std::memcpy(own_ + place, from, length); },
      [&](std::uint64_t sent) { store(own_, &RingWords::sent, sent); });
  sent_ += copied;
  return static_cast<ssize_t>(copied);
}

KVFERRY_INLINE ssize_t ByteRings::send_payload(std::span<const iovec> pieces) noexcept {
  const auto room = room_for(bytes_of(pieces));
  if (!room) {
    return -1;
  }
  std::array<iovec, 256> from;
  Pieces<iovec> left(pieces);
  std::size_t copied = 0;
  while (copied != *room && !left.empty()) {
    const auto offset = static_cast<std::size_t>(sent_ % RingFile::ring_bytes);
    const std::size_t part = std::min({*room - copied, RingFile::ring_bytes - offset, 2 * part_bytes});
    const std::size_t count = left.next(from, part);
    const iovec to{own_ + RingFile::words_bytes + offset, part};
    // The side whose memory may be gone is the one that the kernel reads as this process does; of the other one it takes hold.
    // Of the process's threads this one is there for sure.
    const ssize_t put = ::process_vm_writev(::gettid(), from.data(), count, &to, 1, 0);
    if (put <= 0) {
      if (put < 0 && errno != EFAULT) {
        kernel_copies_ = false;  // forbidden since, or short of memory: the same bytes go in the other way next
        errno = EINTR;
      }
      break;
    }
    const auto bytes = static_cast<std::size_t>(put);
    left.use(bytes);
    copied += bytes;
    sent_ += bytes;
    store(own_, &RingWords::sent, sent_);
  }
  return copied == 0 ? -1 : static_cast<ssize_t>(copied);
}

KVFERRY_INLINE std::uint64_t ByteRings::peers_sent() const noexcept {
  return last_sent_ ? *last_sent_ : load(peers_, &RingWords::sent);
}

KVFERRY_INLINE ssize_t ByteRings::receive(std::span<const iovec> pieces) noexcept {
  const std::uint64_t sent = peers_sent();
  const std::uint64_t there = sent - taken_;
  if (there > RingFile::ring_bytes) {
    errno = tcp::senseless_peer;
    return -1;
  }
  if (there == 0) {
    errno = EAGAIN;
    return -1;
  }
  peer_sent_ = sent;
  const std::size_t copied = go_round(
      taken_, there, pieces,
      [&](std::size_t place, std::byte* to, std::size_t length) { std::memcpy(to, peers_ + place, length); },
      [&](std::uint64_t taken) { store(own_, &RingWords::taken, taken); });
  taken_ += copied;
  return static_cast<ssize_t>(copied);
}

KVFERRY_INLINE ssize_t ByteRings::receive_payload(std::span<const iovec> pieces) noexcept {
  const std::uint64_t sent = peers_sent();
  std::uint64_t there = sent - taken_;
  if (there > RingFile::ring_bytes || there == 0) {
    errno = there == 0 ? EAGAIN : tcp::senseless_peer;
    return -1;
  }
  peer_sent_ = sent;
  std::array<iovec, 256> to;
  Pieces<iovec> left(pieces);
  std::size_t copied = 0;
  while (there != 0 && !left.empty()) {
    const auto offset = static_cast<std::size_t>(taken_ % RingFile::ring_bytes);
    const auto part =
        static_cast<std::size_t>(std::min<std::uint64_t>({there, RingFile::ring_bytes - offset, 2 * part_bytes}));
    const std::size_t count = left.next(to, part);
    const std::size_t place = RingFile::words_bytes + offset;
    ssize_t got = -1;
    if (by_file()) {
      got = ::preadv(peers_file_.descriptor(), to.data(), static_cast<int>(count), static_cast<off_t>(place));
    } else {
      const iovec from{const_cast<std::byte*>(peers_ + place), part};
      got = ::process_vm_readv(::gettid(), to.data(), count, &from, 1, 0);
    }
    if (got <= 0) {
      break;
    }
    const auto bytes = static_cast<std::size_t>(got);
    left.use(bytes);
    there -= bytes;
    taken_ += bytes;
    copied += bytes;
    store(own_, &RingWords::taken, taken_);
  }
  return copied == 0 ? -1 : static_cast<ssize_t>(copied);
}

KVFERRY_INLINE void ByteRings::say_over() noexcept { say_state(own_, RingState::over); }

KVFERRY_INLINE std::uint64_t ByteRings::peers_state() const noexcept {
  std::atomic_thread_fence(std::memory_order_acquire);  // the copy's loads stay before this one
  return load(peers_, &RingWords::state);
}

KVFERRY_INLINE bool ByteRings::has_bytes() const noexcept { return peers_sent() != taken_; }

/// The order of all of these loads and stores is one (seq_cst): either the peer that says it waits then sees what was stored
/// before this, or this sees that it waits.
KVFERRY_INLINE bool ByteRings::bell_due() noexcept {
  const std::uint64_t waiting = load(peers_, &RingWords::waiting);
  if (waiting == 0 || waiting == rung_for_) {
    return false;
  }
  // For what was received there is a bell when there is room again; what was sent has been put where the peer hasn't looked yet.
  const bool unread = sent_ != load(peers_, &RingWords::taken);
  const bool has_room = (waiting & 1) != 0 && RingFile::ring_bytes - (peer_sent_ - taken_) >= room_worth_a_bell;
  if (!unread && !has_room) {
    return false;
  }
  rung_for_ = waiting;
  return true;
}

KVFERRY_INLINE bool ByteRings::may_wait(bool for_room) noexcept {
  const std::uint64_t room = for_room ? 1 : 0;
  // A bell that has rung for a wait is still to be heard: nobody has heard it without `waits_no_more`.
  if (waiting_ == 0 || (waiting_ & 1) != room) {
    waiting_ = ++waits_ << 1 | room;
    store(own_, &RingWords::waiting, waiting_);
  }
  // Nobody waits for a state that can't be: the next call finds it.
  const std::uint64_t unread = for_room ? sent_ - load(peers_, &RingWords::taken) : RingFile::ring_bytes;
  const bool has_room = unread <= RingFile::ring_bytes - room_worth_a_bell || unread > RingFile::ring_bytes;
  if (has_bytes() || has_room) {
    waits_no_more();
    return false;
  }
  return true;
}

KVFERRY_INLINE void ByteRings::waits_no_more() noexcept {
  if (waiting_ != 0) {
    waiting_ = 0;
    store(own_, &RingWords::waiting, 0);
  }
}

}  // namespace kvferry::shm
