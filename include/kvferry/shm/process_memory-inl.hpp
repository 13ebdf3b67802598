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
#include <kvferry/tcp/read_ahead.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {
inline namespace internal {

/// IOV_MAX on Linux.
inline constexpr std::size_t most_pieces = 1024;

/// A list of pieces of memory that is used up from its beginning.
template <class Entry>
class Pieces {
 public:
  explicit Pieces(std::span<const Entry> entries) noexcept : entries_(entries) { skip_used(); }

  [[nodiscard]] bool empty() const noexcept { return entries_.empty(); }
  [[nodiscard]] iovec front() const noexcept {
    return {static_cast<std::byte*>(begin(entries_.front())) + used_, length(entries_.front()) - used_};
  }
  /// Fills `out` with the next pieces. @return their number.
  [[nodiscard]] std::size_t next(std::span<iovec> out) const noexcept {
    const std::size_t count = std::min(out.size(), entries_.size());
    for (std::size_t i = 0; i < count; ++i) {
      out[i] = {begin(entries_[i]), length(entries_[i])};
    }
    if (count != 0) {
      out[0] = front();
    }
    return count;
  }
  void use(std::size_t bytes) noexcept {
    used_ += bytes;
    skip_used();
  }

 private:
  static void* begin(const iovec& piece) noexcept { return piece.iov_base; }
  static std::size_t length(const iovec& piece) noexcept { return piece.iov_len; }
  static void* begin(const tcp::Reference& reference) noexcept {
    return reinterpret_cast<void*>(  // NOLINT(performance-no-int-to-ptr): another process's
        static_cast<std::uintptr_t>(reference.address));
  }
  static std::size_t length(const tcp::Reference& reference) noexcept {
    return static_cast<std::size_t>(reference.length);
  }
  void skip_used() noexcept {
    while (!entries_.empty() && used_ >= length(entries_.front())) {
      used_ -= length(entries_.front());
      entries_ = entries_.subspan(1);
    }
  }

  std::span<const Entry> entries_;
  std::size_t used_ = 0;  ///< Of the first one.
};

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
  readable_ = readable;
  read_by_peer_ = read_by_peer;
}

KVFERRY_INLINE void ProcessMemory::referred(std::uint64_t bytes) noexcept {
  traffic_->sent.fetch_add(bytes, std::memory_order_relaxed);
}

/// The check comes behind the copy: a peer hangs up before it changes what it has referred to, and a process's number
/// stands for other memory only after the process has died or has begun another program. So what is there afterwards was
/// there all the time.
KVFERRY_INLINE tcp::PeerMemory::Fetched ProcessMemory::fetch(std::span<const tcp::Reference> from,
                                                             std::span<const iovec> to, std::error_code& ec) {
  const Fetched fetched = copy(from, to, ec);
  const auto socket = socket_.lock();
  switch (socket ? socket->peer() : UnixSocket::Peer::hung_up) {
    case UnixSocket::Peer::hung_up: return Fetched::hung_up;
    case UnixSocket::Peer::dead: ec = errc::connection_lost; return Fetched::failed;
    case UnixSocket::Peer::there: break;
  }
  if (fetched == Fetched::all) {
    std::uint64_t bytes = 0;
    for (const tcp::Reference& reference : from) {
      bytes += reference.length;
    }
    traffic_->received.fetch_add(bytes, std::memory_order_relaxed);
  }
  return fetched;
}

KVFERRY_INLINE tcp::PeerMemory::Fetched ProcessMemory::copy(std::span<const tcp::Reference> from,
                                                            std::span<const iovec> to, std::error_code& ec) const {
  Pieces<tcp::Reference> remote(from);
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
