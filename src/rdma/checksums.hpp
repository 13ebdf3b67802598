// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include <kvferry/kit/blocks.hpp>
#include <kvferry/kit/striped_operation.hpp>
#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI::rdma {

/// Finds out whether the CPU may read memory, without reading it itself. The adapter keeps registered memory when it is
/// unmapped, but the CPU's own access would end the process.
class MemoryLook {
 public:
  /// Don't share it with channels of a forked child: there its descriptor may be another file's.
  /// @throws TransferError if there is no descriptor left.
  MemoryLook();
  MemoryLook(const MemoryLook&) = delete;
  MemoryLook& operator=(const MemoryLook&) = delete;
  ~MemoryLook();

  /// Has the kernel read a byte of each page of memory.
  [[nodiscard]] bool can_read(std::span<const iovec> pieces) const noexcept;

 private:
  int descriptor_;
};

/// The part of an object that one checksum covers, at most `max_part_bytes`.
struct ObjectPart {
  std::uint64_t length = 0;
  /// A write or read: its place in the peer's regions.
  RemoteRange remote;
};

/// The part that begins at this byte of an object, which isn't the object's end. @param range where the object lies.
[[nodiscard]] ObjectPart part_of(const RemoteRange& range, std::uint64_t offset);

/// The address at which a region of the peer begins: regions may share memory.
using RegionAddress = std::function<std::uint64_t(std::uint32_t)>;

/// The objects of a one-sided batch that land on others of the same batch, by number; empty if there are none. Their
/// bytes can't be compared. If more than 32,768 blocks interleave, their objects count as landing on each other.
[[nodiscard]] std::vector<bool> landing_on_others(const TransferRequest& request, const RegionAddress& address_of_region);

/// As `kit::lands_on_itself`, of memory that the batch names by way of several regions as well.
[[nodiscard]] bool lands_on_itself(const TransferRequest& request, const RegionAddress& address_of_region);

}  // namespace kvferry::rdma
