// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <new>
#include <system_error>
#include <utility>

#include "slice_table.hpp"
#include "verbs.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

/// The channel's own memory, registered for as long as it lives; peers can't reach it.
class RegisteredBuffer {
 public:
  RegisteredBuffer() = default;
  /// @throws std::system_error
  RegisteredBuffer(ibv_pd* domain, std::size_t size)
      : size_(size), memory_(static_cast<std::byte*>(::operator new(size, alignment))) {
    region_ = register_memory(domain, memory_.get(), size, IBV_ACCESS_LOCAL_WRITE);
    if (region_ == nullptr) {
      throw std::system_error(last_verbs_error(), "registering " + std::to_string(size) + " bytes for messages");
    }
  }

  [[nodiscard]] std::byte* data() const noexcept { return memory_.get(); }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] std::uint32_t local_key() const noexcept { return region_->lkey; }

 private:
  static constexpr std::align_val_t alignment{4096};

  struct Free {
    void operator()(std::byte* memory) const noexcept { ::operator delete(memory, alignment); }
  };

  std::size_t size_ = 0;
  std::unique_ptr<std::byte, Free> memory_;
  MemoryRegionPtr region_;
};

}  // namespace kvferry::rdma
