// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_shm.hpp>
#ifndef KVFERRY_SHM_TRANSFER_CHANNEL_HPP
#define KVFERRY_SHM_TRANSFER_CHANNEL_HPP

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include <kvferry/channel_options.hpp>
#include <kvferry/config.hpp>
#include <kvferry/kit/transfer_channel_kit.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// Options of a channel within one host.
struct ShmOptions : ChannelOptions {
  /// The users (uid_t) whose processes may connect, and be connected to, besides this process's own effective user. Each
  /// side needs the other's user. The kernel names the user that a process had when it began to listen or to connect: a
  /// peer that gives root up after its channel was made counts as root when it is connected to, and as its new user when
  /// it connects. So allow both.
  std::vector<std::uint32_t> allowed_users;

  /// Whether this side reads payload from the memory of the peer's process, if the kernel allows it, and lets the peer
  /// read from this process's memory. False: all bytes go through the connection's rings, or through its socket if it
  /// has none, except bytes in a `SharedRegion`.
  bool process_memory = true;

  /// Frames (an operation's bytes, up to 1 MiB) with fewer bytes go through the connection's rings or socket. That is
  /// faster than a system call that copies them.
  std::size_t process_memory_threshold = std::size_t{16} << 10;

  /// See `TcpOptions::drain_timeout`.
  std::chrono::milliseconds drain_timeout{100};

  /// See `TcpOptions::frame_timeout`. From 10 milliseconds to an hour.
  std::chrono::milliseconds frame_timeout{60'000};
};

/// Moves pages between processes of one host. Each peer has a connection: a Unix-domain socket, with rings in memory
/// that both processes map, if they can. Both processes have to be in one network namespace, as the containers of a pod
/// are.
///
/// Payload of at least `ShmOptions::process_memory_threshold`, in pieces of 1 KiB or more on average, doesn't go
/// through the connection if the kernel lets its receiver read the sender's memory (process_vm_readv(2)). The receiver
/// then copies it once, from its source to its destination. A process only writes to its own memory. Reading is
/// possible if both processes run as one user and in one namespace of process ids, and neither kernel.yama.ptrace_scope
/// nor a seccomp filter forbids it. Each side tries that once while it connects. Else the bytes go through the
/// connection. `PeerInfo::path` and the event "path_chosen" tell the way for each direction, and the reason.
///
/// A process that may read this process's memory may read all of it: the processes trust each other as far as the
/// kernel lets them. The side that owns a region still checks the access rights of regions. See docs/security.md.
///
/// Peers map a region for reading if it is the whole of a `SharedRegion` and grants them `Access::read`. That needs
/// none of the conditions above. The initiator of a read then copies the bytes itself; an asynchronous call copies up
/// to 1 MiB on the calling thread. A read that has copied bytes after `remove_region` returned ends with an error.
///
/// If a deadline passes before the peer has dealt with all that was sent of a write or send, the operation may end up
/// to `ShmOptions::drain_timeout` later.
///
/// A subclass that overrides `handle_init_side_msg` follows the rule at `TcpTransferChannel`.
class KVFERRY_EXPORT ShmTransferChannel : public kit::TransferChannelKit {
 public:
  /// Checks the regions, starts listening for handshakes if there is a `peer_init_url`, and starts the I/O threads.
  /// @throws TransferError `errc::invalid_region`, `errc::not_supported` (a region of a dma-buf), `errc::invalid_url`,
  ///   the errno of a bind that failed, naming the address, or `errc::timed_out` if the name of a host to listen at was
  ///   not resolved within `handshake_timeout`.
  explicit ShmTransferChannel(ShmOptions options);
  ~ShmTransferChannel() override;

  [[nodiscard]] std::string_view transport() const noexcept override;
  [[nodiscard]] Capabilities capabilities() const noexcept override;
  /// Has the paths "socket" (the rings, or the socket if there are none), "process memory" and "shared memory". The
  /// latter two count the bytes that peers were told to read, and the bytes that this side read. Peers' reads of
  /// regions that they have mapped are not counted.
  [[nodiscard]] ChannelStats stats() const override;

 protected:
  [[nodiscard]] std::unique_ptr<kit::Dial> dial(const std::string& peer_id) override;
  [[nodiscard]] Bytes accept(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint,
                             kit::Clock::time_point deadline, kit::LinkHandler on_link) override;
  [[nodiscard]] bool leaves_host_in_the_clear() const noexcept override;
  void stop_listening() override;

 private:
  class Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace kvferry

#endif  // KVFERRY_SHM_TRANSFER_CHANNEL_HPP
