// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <cstddef>
#include <system_error>
#include <utility>

#include <kvferry/memory_region.hpp>
#include <kvferry/testing/patterns.hpp>
#include <kvferry/testing/peer_memory.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Memory of its own that can be taken away: after `unmap`, an access faults.
class MappedMemory {
 public:
  MappedMemory(std::size_t pages, std::size_t page_size) : size_(pages * page_size), page_size_(page_size) {
    void* const memory = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::system_error(errno, std::system_category(), "mmap");
    }
    data_ = static_cast<std::byte*>(memory);
    fill_constant(PeerMemory(whole()), background);
  }
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;
  ~MappedMemory() { unmap(); }

  void unmap() {
    if (std::byte* const memory = std::exchange(data_, nullptr)) {
      ::munmap(memory, size_);
    }
  }

  [[nodiscard]] MemoryRegion region(Access access = Access::read_write) const {
    return {data_, size_, page_size_, access};
  }
  [[nodiscard]] MutableBuffer whole() const { return {data_, size_}; }
  [[nodiscard]] PeerMemory page(std::size_t index) const {
    return PeerMemory(whole().subspan(index * page_size_, page_size_));
  }

 private:
  const std::size_t size_;
  const std::size_t page_size_;
  std::byte* data_ = nullptr;
};

}  // namespace kvferry::testing
