// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/detail/descriptor.hpp>
#include <kvferry/detail/process.hpp>
#include <kvferry/shm/byte_rings.hpp>
#include <kvferry/shm/mapped_file.hpp>
#include <kvferry/tcp/peer_memory.hpp>
#include <kvferry/tcp/socket.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// The memory of another process, by a descriptor that doesn't work any more when the process has ended or runs another
/// program.
struct OpenMemory {
  Descriptor file;                ///< /proc/PID/mem; none if it can't be opened, or isn't needed.
  std::uint64_t known_place = 0;  ///< An address that is mapped for as long as the program runs.

  explicit operator bool() const noexcept { return static_cast<bool>(file); }
};
/// @param user the user who must own it. @return without a file, and with errno set, if it can't be opened.
[[nodiscard]] OpenMemory open_memory(std::int64_t pid, std::uint32_t user, std::uint64_t known_place);

/// As recvmsg(2), which doesn't wait. Descriptors that come with the bytes are closed.
[[nodiscard]] ssize_t receive_bytes(int socket, std::span<iovec> pieces);

/// As sendmsg(2), which doesn't wait and raises no signal, with descriptors that go with the bytes: at most
/// `tcp::PeerMemory::max_mapped`.
[[nodiscard]] ssize_t send_with(int socket, std::span<iovec> pieces, std::span<const int> descriptors);

/// Ends a connection to a peer, or a socket's listening, before the socket is closed. Reads all bytes that have come,
/// with `receive_bytes`; the kernel would close unread descriptors with the socket.
void read_empty(int socket) noexcept;
void refuse_all(int listening) noexcept;

/// Descriptors of files in memory that have come over a Unix-domain socket and have not been taken yet.
class PassedDescriptors {
 public:
  /// As recvmsg(2) without waiting; keeps the descriptors that come with the bytes. -1 with EPROTO if anything else
  /// comes, or more descriptors than an honest peer sends ahead. If all connections together hold a quarter of the
  /// process's descriptors, new ones are closed.
  /// @param most the most descriptors that may wait here.
  [[nodiscard]] ssize_t receive(int socket, std::span<iovec> pieces, std::size_t most = tcp::PeerMemory::max_mapped);
  /// Whether one has come that was closed because this process may have no more.
  [[nodiscard]] bool lost() const noexcept { return lost_; }
  /// @return the one of the file with this inode; none if it isn't there.
  [[nodiscard]] PassedDescriptor take(std::uint64_t inode);
  /// @return the oldest one; none if there is none.
  [[nodiscard]] PassedDescriptor take();

 private:
  std::vector<PassedDescriptor> descriptors_;
  bool lost_ = false;
};

/// The socket of a link: a Unix-domain socket of type SOCK_STREAM, and the memory of the peer's process. With
/// `ByteRings` the link's bytes go through the rings. The socket then brings descriptors, and bells: bytes that only
/// announce a change in the rings. When the socket ends, bytes that are in the rings still count.
class UnixSocket final : public tcp::Socket {
 public:
  /// @param by_socket how many of the first sent bytes go through the socket nevertheless.
  UnixSocket(int descriptor, OpenMemory memory, PassedDescriptors passed = {}, std::unique_ptr<ByteRings> rings = nullptr,
             std::size_t by_socket = 0) noexcept
      : Socket(descriptor),
        memory_(std::move(memory)),
        passed_(std::move(passed)),
        rings_(std::move(rings)),
        by_socket_(rings_ ? by_socket : 0) {}

  UnixSocket(const UnixSocket&) = delete;
  UnixSocket& operator=(const UnixSocket&) = delete;
  ~UnixSocket() override {
    if (!origin_.was_forked()) {  // a child hasn't its parent's file, and must not end its parent's connection
      operations_end();
      read_empty(descriptor());
    }
  }

  [[nodiscard]] ssize_t send(std::span<iovec> pieces) override { return send_into(&ByteRings::send, pieces); }
  [[nodiscard]] ssize_t send_payload(std::span<iovec> pieces) override {
    return send_into(&ByteRings::send_payload, pieces);
  }
  [[nodiscard]] ssize_t receive(std::span<iovec> pieces) override { return receive_with(&ByteRings::receive, pieces); }
  [[nodiscard]] ssize_t receive_payload(std::span<iovec> pieces) override {
    return receive_with(&ByteRings::receive_payload, pieces);
  }

  /// A Unix-domain socket has no MSG_TRUNC that drops bytes of a stream.
  [[nodiscard]] ssize_t discard(std::size_t bytes) override;
  /// The peer may be reading buffers: it must see the end before they change.
  void operations_end() const noexcept override {
    if (rings_) {
      rings_->say_over();
    }
    shut();
  }
  [[nodiscard]] std::size_t descriptors() const noexcept override {
    return std::size_t{1} + (memory_ ? 1 : 0) + (rings_ && rings_->by_file() ? 1 : 0);
  }
  [[nodiscard]] bool by_cpu() const noexcept override { return rings_ != nullptr; }
  [[nodiscard]] bool to_buffer() const noexcept override { return false; }
  /// Bells that have come must be taken from the socket before a thread waits for it.
  [[nodiscard]] bool over() const noexcept override { return rings_ && (look_ || rings_->has_bytes()); }
  [[nodiscard]] std::size_t room(std::size_t wanted) noexcept override {
    return rings_ && by_socket_ == 0 ? rings_->room(wanted) : wanted;
  }
  [[nodiscard]] bool kernel_copies() const noexcept override { return rings_ && by_socket_ == 0 && rings_->kernel_copies(); }
  [[nodiscard]] bool hears_bells() const noexcept override { return rings_ != nullptr; }
  [[nodiscard]] bool brings_descriptors() const noexcept override { return true; }
  [[nodiscard]] bool may_wait(bool for_room) noexcept override;
  void woken() noexcept override { look_ = true; }

  /// Sends a descriptor with the next bytes. For the sending thread; `take_passed` is for the receiving one.
  void pass(std::shared_ptr<const Descriptor> passed) { to_pass_.push_back(std::move(passed)); }
  /// @return the descriptor of the file with this inode, if it has come; the caller owns it.
  [[nodiscard]] PassedDescriptor take_passed(std::uint64_t inode);

  /// Whether the peer has hung up, or the connection is broken.
  [[nodiscard]] bool hung_up() const noexcept;
  enum class Peer { there, hung_up, dead };
  /// Of memory that a message of the peer's refers to, or that this side reads by itself: `read` is mapped, too.
  enum class Copied { mapped, read, in_place };
  /// Whether bytes count that were just copied out of the peer's memory: the peer hadn't hung up by then. Memory that
  /// this side reads by itself was valid for the peer then: its end hadn't come. Memory that was read in place was this peer's:
  /// its process lived, with the same program.
  [[nodiscard]] Peer peer(Copied copied) const noexcept;

 private:
  [[nodiscard]] bool lives() const noexcept;
  [[nodiscard]] ssize_t receive_with(ssize_t (ByteRings::*from_rings)(std::span<const iovec>) noexcept,
                                     std::span<iovec> pieces);
  [[nodiscard]] ssize_t send_into(ssize_t (ByteRings::*into_rings)(std::span<const iovec>) noexcept, std::span<iovec> pieces);
  [[nodiscard]] ssize_t send_by_socket(std::span<iovec> pieces);
  void ring() noexcept;
  void ring_if_owed() noexcept {
    if (bell_owed_) {
      ring();
    }
  }
  /// Takes the bytes and descriptors that have come by the socket itself. @return whether there may be more.
  bool look();

  const ProcessOfOrigin origin_;
  const OpenMemory memory_;
  std::vector<std::shared_ptr<const Descriptor>> to_pass_;
  PassedDescriptors passed_;

  const std::unique_ptr<ByteRings> rings_;  ///< Null: there are none, and the rest below is of no use.
  std::size_t by_socket_;                   ///< Bytes that are to go there before the rings are used.
  mutable bool look_ = true;                ///< There may be something to take from the socket: bells, or its end.
  std::uint32_t looks_at_rings_ = 0;        ///< In vain, since the last one at the socket.
  bool bell_owed_ = false;                  ///< One that there was no memory for.
  bool ended_ = false;                      ///< The socket has.
  int error_ = 0;                           ///< Of the socket, which nobody has been told yet.
};

/// The process at the other end of a connection, or the listening one, according to the kernel.
struct PeerProcess {
  std::int64_t pid = 0;  ///< 0: in a namespace of process ids that this process can't see.
  std::uint32_t user = 0;
};
/// @throws TransferError with the errno.
[[nodiscard]] PeerProcess peer_process(int descriptor);

/// The bytes of an abstract socket's name, which has no file.
inline constexpr std::size_t name_bytes = 24;

/// Opens a socket that doesn't block and that started programs don't inherit, and listens at an abstract name.
/// @throws TransferError with the errno.
[[nodiscard]] Descriptor listen_at(const std::vector<std::byte>& name);
/// The same, connected to that name.
[[nodiscard]] Descriptor connect_to(const std::vector<std::byte>& name);

}  // namespace kvferry::shm
