// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/shm/process_memory.hpp>

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <fstream>
#include <system_error>

#include <kvferry/error.hpp>
#include <kvferry/shm/copy.hpp>
#include <kvferry/shm/pieces.hpp>
#include <kvferry/tcp/read_ahead.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {
inline namespace internal {

/// Of payload that the peer has mapped: less is through the socket before it is looked up. Likewise, of the pieces of its memory.
inline constexpr std::uint64_t least_mapped_bytes = 1024;
/// The same beside rings, which bring a page of 4 KiB without a system call; two look behind a copy whether the peer is there.
inline constexpr std::uint64_t least_mapped_beside_rings = 4097;
/// The same of a peer that needs no system call behind a copy: see `UnixSocket::peer`.
inline constexpr std::uint64_t least_mapped_unforked = 2048;
inline constexpr std::uint64_t least_mapped_piece = 256;
/// Of payload that goes past the caches. Likewise.
inline constexpr std::uint64_t least_streamed_bytes = std::uint64_t{256} << 10;
inline constexpr std::uint64_t least_streamed_piece = 4096;
/// Of payload that isn't mapped: smaller pieces cost the kernel more to look up than to copy once more.
inline constexpr std::uint64_t least_piece = 1024;

KVFERRY_INLINE ssize_t read_memory(std::int64_t pid, std::span<const iovec> to, std::span<const iovec> from) {
  return ::process_vm_readv(static_cast<pid_t>(pid), to.data(), to.size(), from.data(), from.size(), 0);
}

}  // namespace internal

KVFERRY_INLINE std::string Reach::reason() const {
  switch (value) {
    case unknown: return "nobody has tried";
    case switched_off: return "process_memory is off";
    case other_namespace: return "the processes are in different namespaces of process ids";
    case other_process: return "other memory than the peer's was found";
    case other_user: return "the processes are of different users";
    default: break;
  }
  std::string text = std::generic_category().message(static_cast<int>(value));
  if (value == EPERM) {
    std::ifstream file("/proc/sys/kernel/yama/ptrace_scope");
    int scope = 0;
    if (file >> scope && scope != 0) {
      text += ": kernel.yama.ptrace_scope is " + std::to_string(scope);
    }
  }
  return text;
}

KVFERRY_INLINE const tcp::Secret& proof_of_memory() {
  static const tcp::Secret proof = [] {
    tcp::Secret made{};
    make_secret(made);
    return made;
  }();
  return proof;
}

KVFERRY_INLINE Reach ProcessMemory::try_to_read(const OpenMemory& memory, const tcp::Secret& proof) {
  tcp::Secret found{};
  const iovec to{found.data(), found.size()};
  const iovec from{reinterpret_cast<void*>(  // NOLINT(performance-no-int-to-ptr): another process's
                       static_cast<std::uintptr_t>(memory.known_place)),
                   found.size()};
  const ssize_t read = read_memory(pid_, {&to, 1}, {&from, 1});
  if (read < 0) {
    return {errno == EFAULT ? Reach::other_process : static_cast<std::uint32_t>(errno)};
  }
  tcp::Secret found_by_file{};
  const ssize_t of_file =
      ::pread(memory.file.get(), found_by_file.data(), found_by_file.size(), static_cast<off_t>(memory.known_place));
  const bool right =
      equal_secrets(found, proof) && of_file == ssize_t{sizeof(found_by_file)} && equal_secrets(found_by_file, proof);
  return {right ? 0 : Reach::other_process};
}

KVFERRY_INLINE void ProcessMemory::begin(const std::shared_ptr<UnixSocket>& socket, bool readable, bool read_by_peer) {
  socket_ = socket;
  by_rings_ = socket->hears_bells();
  readable_ = readable;
  read_by_peer_ = read_by_peer;
}

KVFERRY_INLINE std::uint64_t ProcessMemory::least_bytes() const noexcept {
  if (!handed_.any()) {
    return least_bytes_;
  }
  const std::uint64_t beside_rings = RingFile::process_has_forked() ? least_mapped_beside_rings : least_mapped_unforked;
  return std::min(by_rings_ ? beside_rings : least_mapped_bytes, least_bytes_);
}

KVFERRY_INLINE bool ProcessMemory::refer(std::span<const tcp::Reference> references, std::uint64_t bytes) {
  const std::uint64_t average = bytes / references.size();
  if (average >= std::min(least_mapped_piece, least_bytes_) && handed_.any() && handed_.cover(references)) {
    traffic_->mapped.sent.fetch_add(bytes, std::memory_order_relaxed);
    return true;
  }
  if (!read_by_peer_ || bytes < least_bytes_ || average < std::min(least_piece, least_bytes_)) {
    return false;
  }
  traffic_->read.sent.fetch_add(bytes, std::memory_order_relaxed);
  return true;
}

/// The checks come behind the copy: a peer hangs up before it changes what it has referred to, or takes it back.
KVFERRY_INLINE tcp::PeerMemory::Fetched ProcessMemory::fetch(std::span<const tcp::Reference> from,
                                                             std::span<const iovec> to, std::error_code& ec) {
  const bool mapped = mapped_.find(from, mapped_pieces_);
  const bool own = mapped && areas_.cover(to);
  if (mapped && (own || !readable_)) {
    return copy_mapped(UnixSocket::Copied::mapped, mapped_pieces_, to, own, ec);
  }
  if (!readable_) {
    ec = errc::protocol_violation;
    return Fetched::failed;
  }
  return read_in_place(from, to, ec);
}

KVFERRY_INLINE tcp::PeerMemory::Fetched ProcessMemory::copy(Way way, std::span<const iovec> from,
                                                            std::span<const iovec> to, std::error_code& ec) {
  return way == Way::mapped ? copy_mapped(UnixSocket::Copied::read, from, to, areas_.cover(to), ec)
                            : read_in_place(from, to, ec);
}

template <class Entry>
tcp::PeerMemory::Fetched ProcessMemory::read_in_place(std::span<const Entry> from, std::span<const iovec> to,
                                                      std::error_code& ec) const {
  const Fetched fetched = behind_copy(UnixSocket::Copied::in_place, read(from, to, ec), ec);
  if (fetched == Fetched::all) {
    std::uint64_t bytes = 0;
    for (const iovec& piece : to) {
      bytes += piece.iov_len;
    }
    traffic_->read.received.fetch_add(bytes, std::memory_order_relaxed);
  }
  return fetched;
}

/// Tells whether a copy counts that has just been made. A process's number stands for other memory only after the process
/// has died or has begun another program. So what is there afterwards was there all the time. A child of it that lives keeps the
/// connection, and its memory.
KVFERRY_INLINE tcp::PeerMemory::Fetched ProcessMemory::behind_copy(UnixSocket::Copied copied, Fetched fetched,
                                                                   std::error_code& ec) const {
  std::atomic_thread_fence(std::memory_order_acquire);  // the copy's loads stay before the look
  const auto socket = socket_.lock();
  switch (socket ? socket->peer(copied) : UnixSocket::Peer::hung_up) {
    case UnixSocket::Peer::hung_up: ec.clear(); return Fetched::hung_up;
    case UnixSocket::Peer::dead: ec = errc::connection_lost; return Fetched::failed;
    case UnixSocket::Peer::there: break;
  }
  return fetched;
}

/// @param own both sides of the copy are there for sure, for the CPU.
KVFERRY_INLINE tcp::PeerMemory::Fetched ProcessMemory::copy_mapped(UnixSocket::Copied copied,
                                                                   std::span<const iovec> from,
                                                                   std::span<const iovec> to, bool own,
                                                                   std::error_code& ec) {
  std::uint64_t bytes = 0;
  for (const iovec& piece : from) {
    bytes += piece.iov_len;
  }
  Fetched fetched = Fetched::all;
  if (own) {
    const bool large = bytes >= least_streamed_bytes && bytes / from.size() >= least_streamed_piece;
    shm::copy(from, to, large ? Stores::streaming : Stores::cached);
  } else {
    fetched = mapped_.read(from, to, ec);
  }
  fetched = behind_copy(copied, fetched, ec);
  if (fetched == Fetched::all) {
    traffic_->mapped.received.fetch_add(bytes, std::memory_order_relaxed);
  }
  return fetched;
}

KVFERRY_INLINE std::optional<tcp::PeerMemory::Share> ProcessMemory::share(const LocalRegion& region) {
  const auto socket = socket_.lock();
  return socket ? handed_.share(region, read_by_peer_, *socket) : std::nullopt;
}

KVFERRY_INLINE std::uint32_t ProcessMemory::map(const RemoteRegion& region, const Share& share) {
  const auto socket = socket_.lock();
  return socket ? mapped_.map(region, share, readable_, *socket) : EBADF;
}

KVFERRY_INLINE std::string ProcessMemory::path() const { return mapped_.path() + handed_.path(); }

template <class Entry>
tcp::PeerMemory::Fetched ProcessMemory::read(std::span<const Entry> from, std::span<const iovec> to,
                                             std::error_code& ec) const {
  Pieces<Entry> remote(from);
  Pieces<iovec> local(to);
  std::array<iovec, most_pieces> sources;
  std::array<iovec, most_pieces> destinations;
  bool careful = false;
  while (!remote.empty() && !local.empty()) {
    std::size_t source_count = 1;
    std::size_t destination_count = 1;
    if (careful) {
      // No more than lies on one page of memory on either side, so that the page is found that isn't there.
      sources[0] = remote.front();
      destinations[0] = local.front();
      const std::size_t length =
          std::min({sources[0].iov_len, destinations[0].iov_len, tcp::left_on_page(sources[0].iov_base),
                    tcp::left_on_page(destinations[0].iov_base)});
      sources[0].iov_len = length;
      destinations[0].iov_len = length;
    } else {
      source_count = remote.next(sources);
      destination_count = local.next(destinations);
    }
    const ssize_t read =
        read_memory(pid_, std::span(destinations).first(destination_count), std::span(sources).first(source_count));
    if (read > 0) {
      remote.use(static_cast<std::size_t>(read));
      local.use(static_cast<std::size_t>(read));
      continue;
    }
    if (read < 0 && errno != EFAULT) {
      ec = {errno, std::system_category()};
      return Fetched::failed;
    }
    if (!careful) {
      careful = true;
      continue;
    }
    std::array<std::byte, 4096> elsewhere;
    const iovec trial{elsewhere.data(), sources[0].iov_len};
    return read_memory(pid_, {&trial, 1}, {sources.data(), 1}) > 0 ? Fetched::unwritable : Fetched::unreadable;
  }
  return Fetched::all;
}

}  // namespace kvferry::shm
