// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/detail/descriptor.hpp>
#include <kvferry/tcp/socket.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// The memory of another process, by a descriptor that is of no use any more when the process has died or runs another
/// program.
struct OpenMemory {
  Descriptor file;                ///< /proc/PID/mem; none where it can't be opened, or there is no need of it.
  std::uint64_t known_place = 0;  ///< Where there is memory for as long as the program runs.

  explicit operator bool() const noexcept { return static_cast<bool>(file); }
};
/// @param user who has to own it. @return with errno set and without a file if that can't be.
[[nodiscard]] OpenMemory open_memory(std::int64_t pid, std::uint32_t user, std::uint64_t known_place);

/// The socket of a link: a Unix-domain socket of type SOCK_STREAM, and the memory of the peer's process.
class UnixSocket final : public tcp::Socket {
 public:
  UnixSocket(int descriptor, OpenMemory memory) noexcept : Socket(descriptor), memory_(std::move(memory)) {}

  /// A Unix-domain socket has no MSG_TRUNC that drops bytes of a stream.
  [[nodiscard]] ssize_t discard(std::size_t bytes) noexcept override;
  /// The peer must see the end before the buffers change that it may be reading.
  void operations_end() const noexcept override { shut(); }
  [[nodiscard]] std::size_t descriptors() const noexcept override { return memory_ ? 2 : 1; }

  enum class Peer { there, hung_up, dead };
  /// Whether the peer's process has lived, with the program that it had, and kept the connection, until now.
  [[nodiscard]] Peer peer() const noexcept;

 private:
  const OpenMemory memory_;
};

/// Who is at the other end of a connection, or listens there, according to the kernel.
struct PeerProcess {
  std::int64_t pid = 0;  ///< 0: in a namespace of process ids that this process can't see.
  std::uint32_t user = 0;
};
/// @throws TransferError with the errno.
[[nodiscard]] PeerProcess peer_process(int descriptor);

/// The bytes of an abstract socket's name, which has no file.
inline constexpr std::size_t name_bytes = 24;

/// Opens a socket that programs which this process starts don't inherit, and which doesn't block, and listens at an
/// abstract name. @throws TransferError with the errno.
[[nodiscard]] Descriptor listen_at(const std::vector<std::byte>& name);
/// The same, connected to that name.
[[nodiscard]] Descriptor connect_to(const std::vector<std::byte>& name);

}  // namespace kvferry::shm
