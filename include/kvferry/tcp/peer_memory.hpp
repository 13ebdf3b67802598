// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <span>
#include <system_error>

#include <kvferry/config.hpp>
#include <kvferry/tcp/frame.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// The memory of the process at the other end of a connection, where one process can read the other's: payload is then
/// copied once, by its receiver. Nobody ever writes to memory that isn't its own.
///
/// Who sends references leaves the memory as it is until the frame is acknowledged or the connection is hung up.
class KVFERRY_EXPORT PeerMemory {
 public:
  enum class Fetched {
    all,
    unreadable,  ///< The peer's memory isn't there.
    unwritable,  ///< Nor is this process's.
    hung_up,     ///< The peer has hung up by now: the bytes may be anything. The connection ends behind what is in it.
    failed,      ///< The connection is of no use any more.
  };

  virtual ~PeerMemory() = default;

  /// Whether this side may fetch.
  [[nodiscard]] virtual bool readable() const noexcept = 0;
  /// Whether the peer may.
  [[nodiscard]] virtual bool read_by_peer() const noexcept = 0;
  /// The least payload of a frame for which that is worth while.
  [[nodiscard]] virtual std::uint64_t least_bytes() const noexcept = 0;
  /// So many bytes are going to be fetched by the peer.
  virtual void referred(std::uint64_t bytes) noexcept = 0;
  /// Copies what `from` names to `to`, which has as many bytes. Waits for nothing but the kernel, which may
  /// have to bring in pages of either side.
  /// @param ec why, if it failed.
  [[nodiscard]] virtual Fetched fetch(std::span<const Reference> from, std::span<const iovec> to,
                                      std::error_code& ec) = 0;
};

}  // namespace kvferry::tcp
