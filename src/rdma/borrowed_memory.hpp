// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include <kvferry/transfer_spec.hpp>

#include <kvferry/kit/blocks.hpp>
#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/striped_operation.hpp>
#include "message.hpp"
#include "rail_domain.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

/// An operation's objects as its rail can use them, where some lie outside of every region: those are copied
/// through staging blocks if they are small, or alone among others' memory, as long as there are blocks; else
/// registered, for as long as this lives. To register is a system call that pins pages, for each range that isn't
/// adjacent to others, and takes as long as copying some 64 KiB.
///
/// There is no cache of registrations. A cache would have to know when memory was unmapped and mapped anew, or the
/// adapter would write into pages that are no longer the caller's; here nothing stays registered that the caller didn't
/// lend.
class BorrowedMemory {
 public:
  /// @return nothing, without an error, if all objects lie in regions.
  /// @param regions the domain's. @param owners the objects as the caller has them; what they refer to outlives what is
  ///   returned.
  [[nodiscard]] static std::unique_ptr<BorrowedMemory> borrow(RailDomain& domain, const SliceTable& regions,
                                                              const kit::LocalBytes& owners, kit::ObjectRange range,
                                                              bool for_read, kit::Failure& failure);

  /// Where the objects lie now; those outside of the range are as they were.
  [[nodiscard]] std::span<const MutableBuffer> objects() const noexcept { return objects_; }
  [[nodiscard]] const SliceTable& slices() const noexcept { return slices_; }

  /// After a read: hands objects `[begin, end)` that were staged to their owner.
  void copy_back(std::size_t begin, std::size_t end) const;

 private:
  /// Copies an object's bytes, and not what lies between its blocks. @param staged to or from there, where its buffer is now.
  void copy(std::size_t object, MutableBuffer staged, bool to_owner) const;
  /// @return false if there is no block left.
  [[nodiscard]] bool stage(RailDomain& domain, std::size_t object, bool for_read);

  kit::LocalBytes owners_;  ///< As the caller has them.
  std::vector<MutableBuffer> objects_;
  std::vector<std::size_t> staged_;  ///< For a read, in order.
  SliceTable slices_;
  std::vector<std::unique_ptr<RailDomain::StagingBlock>> blocks_;
  std::size_t used_ = 0;  ///< Of the last block.
  std::vector<MemoryRegionPtr> registered_;
};

/// The buffers of a recv, as they are offered to the sender. Into those in regions that peers may write to it can write
/// directly; large others are registered for as long as this lives, and closed to the sender with it.
class OfferedBuffers {
 public:
  /// @param eager_bytes up to this size no offer is worth while.
  /// @param regions the domain's, @param domain where to register the others.
  [[nodiscard]] static kit::Failure offer(const SliceTable& regions, ibv_pd* domain,
                                          std::span<const MutableBuffer> objects, std::size_t eager_bytes,
                                          OfferedBuffers& offered);

  [[nodiscard]] const std::vector<PostedBuffer>& posted() const noexcept { return posted_; }
  /// Whether the sender may write into any of them.
  [[nodiscard]] bool any_direct() const noexcept { return any_direct_; }
  /// Whether closing is enough to keep the sender out; else the region's key lets it in as long as there is a queue
  /// pair.
  [[nodiscard]] bool revocable() const noexcept { return !uses_region_keys_; }
  void close() { registered_.clear(); }

 private:
  std::vector<PostedBuffer> posted_;
  std::vector<MemoryRegionPtr> registered_;
  bool any_direct_ = false;
  bool uses_region_keys_ = false;
};

}  // namespace kvferry::rdma
