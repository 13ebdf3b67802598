// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <system_error>

#include <kvferry/config.hpp>
#include <kvferry/kit/region_list.hpp>
#include <kvferry/memory_region.hpp>
#include <kvferry/tcp/frame.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// The memory of the process at the other end of a connection, if one process can read the other's memory. The receiver
/// then copies payload once. A process never writes to another's memory.
///
/// The sender of references doesn't change the memory until the frame is acknowledged or the connection is hung up.
///
/// Thread safety: one thread at a time, except for `path` and `reads`.
class KVFERRY_EXPORT PeerMemory {
 public:
  enum class Fetched {
    all,
    unreadable,  ///< The peer's memory isn't there.
    unwritable,  ///< This process's memory isn't there.
    hung_up,     ///< The peer has hung up by now, and the bytes are not valid. The connection ends behind its remaining
                 ///< bytes.
    failed,      ///< The connection is of no use any more.
  };

  virtual ~PeerMemory() = default;

  /// Whether this side may fetch anything.
  [[nodiscard]] virtual bool fetches() const noexcept = 0;
  /// Whether the peer may.
  [[nodiscard]] virtual bool refers() const noexcept = 0;
  /// The least payload of a frame for which fetching may be faster.
  [[nodiscard]] virtual std::uint64_t least_bytes() const noexcept = 0;
  /// Whether a frame with `bytes` bytes of payload should have these references in their place: the peer may fetch all
  /// of them, and that is faster. If true, the frame must have them.
  [[nodiscard]] virtual bool refer(std::span<const Reference> references, std::uint64_t bytes) = 0;
  /// Copies the memory of `from` to `to`, which has as many bytes. Waits only for the kernel, which may have to bring
  /// in pages of either side.
  /// @param ec the error, if it failed.
  [[nodiscard]] virtual Fetched fetch(std::span<const Reference> from, std::span<const iovec> to,
                                      std::error_code& ec) = 0;

  /// @name Regions that the other side reads by itself
  /// @{

  /// The way: the regions are mapped, or the kernel lets one process read the other's memory.
  enum class Way : std::uint8_t { mapped, in_place };

  /// The most regions of either side at a time; also the most regions for which the peer's answer is outstanding.
  static constexpr std::size_t max_mapped = 64;

  /// The data that travel for a region that the peer may read.
  struct Share {
    std::uint64_t address = 0;  ///< In this process.
    std::uint64_t file = 0;  ///< By which the peer knows the descriptor that it got on the connection. 0: it reads in place.
  };
  /// Shares one of this side's regions: its descriptor goes with the next sent bytes. @return nothing if it can't be
  /// shared.
  [[nodiscard]] virtual std::optional<Share> share(const LocalRegion& region) = 0;
  /// The peer's answer. @return false if it wasn't asked.
  [[nodiscard]] virtual bool mapped_by_peer(std::uint32_t number, std::uint32_t status) = 0;
  /// From now on no reference uses the peer's mapping of this region.
  virtual void unshare(std::uint32_t number) = 0;

  /// Maps one of the peer's regions, or prepares to read it in place. @return the status for the answer: 0, or an
  /// errno.
  [[nodiscard]] virtual std::uint32_t map(const RemoteRegion& region, const Share& share) = 0;
  virtual void unmap(std::uint32_t number) = 0;
  /// The peer's regions that are read in this way: with their addresses in this process if they are mapped, else with the
  /// peer's.
  [[nodiscard]] virtual const kit::RegionList& regions(Way way) const noexcept = 0;
  /// Whether there is such a region of this number, as far as is known without waiting. From any thread.
  [[nodiscard]] virtual bool reads(std::uint32_t number) const noexcept = 0;
  /// Copies from such regions. @param ec why, if it failed.
  [[nodiscard]] virtual Fetched copy(Way way, std::span<const iovec> from, std::span<const iovec> to,
                                     std::error_code& ec) = 0;
  /// @}

  /// Whether all of this memory of this process certainly exists, so that the CPU may read and write it.
  [[nodiscard]] virtual bool surely_there(std::span<const iovec> pieces) {
    (void)pieces;
    return false;
  }

  /// A description of the way of bytes outside of the connection, for people. From any thread.
  [[nodiscard]] virtual std::string path() const = 0;
};

}  // namespace kvferry::tcp
