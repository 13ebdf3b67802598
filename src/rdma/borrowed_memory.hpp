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

/// Makes an operation's objects usable for its rail's device if some lie outside of all regions. These are copied
/// through staging blocks if they are small, or have no neighbours, and a block is free. Otherwise they are registered
/// for as long as this lives. Registering is a system call for each contiguous range, which pins pages, and takes as
/// long as copying some 64 KiB.
///
/// There is no cache of registrations. A cache would have to detect memory that was unmapped and mapped anew, or the
/// adapter would write into pages that are no longer the caller's. Here memory stays registered only while the caller
/// lends it.
class BorrowedMemory {
 public:
  /// @return nothing, without an error, if all objects lie in regions.
  /// @param regions the domain's.
  /// @param owners the caller's objects; their memory outlives the result.
  [[nodiscard]] static std::unique_ptr<BorrowedMemory> borrow(RailDomain& domain, const SliceTable& regions,
                                                              const kit::LocalBytes& owners, kit::ObjectRange range,
                                                              bool for_read, kit::Failure& failure);

  /// The objects' present places; objects outside of the range are unchanged.
  [[nodiscard]] std::span<const MutableBuffer> objects() const noexcept { return objects_; }
  [[nodiscard]] const SliceTable& slices() const noexcept { return slices_; }

  /// After a read: hands objects `[begin, end)` that were staged to their owner.
  void copy_back(std::size_t begin, std::size_t end) const;

 private:
  /// Copies an object's bytes, without the bytes between its blocks. @param staged the staging place, to or from which
  /// it copies.
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

/// The buffers of a recv, as they are offered to the sender. The sender can write directly into buffers in regions that
/// peers may write to. Other large ones are registered for as long as this lives; then they are closed to the sender.
class OfferedBuffers {
 public:
  /// @param eager_bytes buffers of up to this size are not offered.
  /// @param regions the domain's, @param domain where to register the others.
  [[nodiscard]] static kit::Failure offer(const SliceTable& regions, ibv_pd* domain,
                                          std::span<const MutableBuffer> objects, std::size_t eager_bytes,
                                          OfferedBuffers& offered);

  [[nodiscard]] const std::vector<PostedBuffer>& posted() const noexcept { return posted_; }
  /// Whether the sender may write into any of them.
  [[nodiscard]] bool any_direct() const noexcept { return any_direct_; }
  /// Whether closing keeps the sender out. If not, the sender has a region's own key, which works as long as there is a
  /// queue pair.
  [[nodiscard]] bool revocable() const noexcept { return !uses_region_keys_; }
  void close() { registered_.clear(); }

 private:
  std::vector<PostedBuffer> posted_;
  std::vector<MemoryRegionPtr> registered_;
  bool any_direct_ = false;
  bool uses_region_keys_ = false;
};

}  // namespace kvferry::rdma
