// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_shm.hpp>
#ifndef KVFERRY_SHARED_REGION_HPP
#define KVFERRY_SHARED_REGION_HPP

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include <kvferry/config.hpp>
#include <kvferry/memory_region.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// The kind of memory pages of a `SharedRegion`.
enum class HugePages : std::uint8_t {
  no,   ///< The system's usual ones.
  yes,  ///< Huge ones, of the system's default size, which the administrator has set aside (vm.nr_hugepages).
};

/// Memory that peers of the same host map, over `ShmTransferChannel`. The CPU then copies payload once, without a
/// system call for its pages.
///
/// A channel lets peers map a region if it is the whole of a `SharedRegion` and grants `Access::read`; `region()` makes
/// such a region. Peers map it only for reading and can never write to the mapping, whatever the access: this side's
/// channel copies their writes. In any other region, or with another transport, the memory is ordinary memory.
///
/// The memory is a file in memory (memfd_create(2)). All of its pages exist from the beginning. Seals (fcntl(2),
/// F_ADD_SEALS) keep anybody from shrinking or growing it, and from new writes or writable mappings. So no access of a
/// peer can fault. The file is in no file system. `RLIMIT_FSIZE` and a container's memory limit apply to it.
///
/// It has to outlive all operations whose objects lie in it, and the channels that have it as a region unless
/// `BaseTransferChannel::remove_region` has returned. Don't change its protection (mprotect(2)): unlike with other
/// memory, a transfer to or from memory that is taken away ends the process. A peer's mapping keeps the pages allocated
/// for as long as its connection lasts. A forked child shares the pages: parent and child see each other's writes.
///
/// Thread safety: distinct objects may be made, used and destroyed at the same time. One object's memory has no locking
/// of its own.
class KVFERRY_EXPORT SharedRegion {
 public:
  /// Allocates the memory, filled with zeros.
  /// @param size bytes; at least 1. The mapping is rounded up to whole pages of memory.
  /// @throws TransferError `errc::invalid_region` if the size is 0 or too large to be rounded up, else the errno of the system:
  ///   ENOMEM or ENOSPC if there is not enough such memory (the error's sentence has the number of huge pages, or says
  ///   that the host has less memory), EFBIG beyond `RLIMIT_FSIZE`, EMFILE, EINVAL or ENOSYS if the kernel has no such
  ///   files or seals (before Linux 5.1; 5.13 for huge pages).
  explicit SharedRegion(std::size_t size, HugePages huge_pages = HugePages::no);
  /// The object that is moved from has no memory afterwards.
  SharedRegion(SharedRegion&& other) noexcept;
  SharedRegion& operator=(SharedRegion&& other) noexcept;
  /// Unmaps it.
  ~SharedRegion();

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  /// The size that was asked for.
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] std::span<std::byte> bytes() const noexcept { return {data_, size_}; }

  /// For `ChannelOptions::regions` and `BaseTransferChannel::add_region`.
  /// @param page_size bytes; divides `size()`.
  [[nodiscard]] MemoryRegion region(std::size_t page_size, Access peer_access = Access::read_write) const noexcept {
    return {data_, size_, page_size, peer_access};
  }

 private:
  void release() noexcept;

  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  std::size_t mapped_ = 0;  ///< Bytes.
  std::shared_ptr<const void> file_;
};

}  // namespace kvferry

#endif  // KVFERRY_SHARED_REGION_HPP
