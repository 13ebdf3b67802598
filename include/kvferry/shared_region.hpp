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

/// Which pages of memory a `SharedRegion` is made of.
enum class HugePages : std::uint8_t {
  no,   ///< The system's usual ones.
  yes,  ///< Huge ones, of the system's default size, which the administrator has set aside (vm.nr_hugepages).
};

/// Memory that `ShmTransferChannel` hands to peers of the same host, which map it: payload is then copied once, by the CPU,
/// without a system call for its pages.
///
/// A channel hands a region out if it is the whole of a `SharedRegion` and grants `Access::read`; `region()` makes such
/// a region. Peers map it only for reading and can never write there, whatever the access: this side's channel copies
/// their writes. In any other region, or with any other transport, the memory is like any other.
///
/// The memory is a file in memory (memfd_create(2)) whose pages are all there from the beginning, and which can be neither
/// shrunk, grown, nor mapped or written anew by anybody (fcntl(2), F_ADD_SEALS): so no access of a peer's can fault. It takes
/// no place in any file system. `RLIMIT_FSIZE` counts, and so does a container's limit for memory.
///
/// It has to outlive the channels that have it as a region, or the return of `BaseTransferChannel::remove_region`, and
/// all operations whose objects lie in it. Leave its protection (mprotect(2)) as it is. Unlike with other memory,
/// transfers of memory that is taken away end the process. A peer's mapping keeps the pages from being freed for as
/// long as its connection lasts. A forked child shares the pages: parent and child see each other's writes.
///
/// Thread safety: distinct objects may be used, made and destroyed at the same time; one, as its memory.
class KVFERRY_EXPORT SharedRegion {
 public:
  /// The memory is zeros.
  /// @param size bytes; at least 1. What is mapped is rounded up to whole pages of memory.
  /// @throws TransferError `errc::invalid_region` if the size is 0 or too large to be rounded up, else the errno of the system:
  ///   ENOMEM or ENOSPC where there is no such memory (the sentence says how many huge pages were wanted, or that the host has
  ///   less memory than that), EFBIG beyond
  ///   `RLIMIT_FSIZE`, EMFILE, EINVAL or
  ///   ENOSYS where the kernel knows no such files or seals (before Linux 5.1; 5.13 for huge pages).
  explicit SharedRegion(std::size_t size, HugePages huge_pages = HugePages::no);
  /// What is moved from has no memory.
  SharedRegion(SharedRegion&& other) noexcept;
  SharedRegion& operator=(SharedRegion&& other) noexcept;
  /// Unmaps it.
  ~SharedRegion();

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  /// As it was asked for.
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
