// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include <kvferry/config.hpp>
#include <kvferry/detail/descriptor.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// A peer's file in memory, mapped for reading. Nothing that the peer does to it can make an access fault: see `map`.
class MappedFile {
 public:
  /// It stays as long as it is, with all pages that it has, and nobody but its owner writes to it.
  static constexpr int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;

  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept
      : file_(std::move(other.file_)), data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(file_, other.file_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~MappedFile();

  /// Maps the first `size` bytes. Believes nothing that the peer has said of the file.
  /// @return an errno: EINVAL if the file is shorter, no file in memory, not sealed, or has holes, which are filled by
  ///   whoever reads there first, if there is memory.
  [[nodiscard]] static int map(Descriptor file, std::uint64_t size, MappedFile& mapped);

  [[nodiscard]] const std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] int descriptor() const noexcept { return file_.get(); }

 private:
  Descriptor file_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace kvferry::shm
