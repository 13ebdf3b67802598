// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include <kvferry/config.hpp>
#include <kvferry/detail/descriptor.hpp>
#include <kvferry/shm/held.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

struct DescriptorsOfPeers {};
/// A descriptor that a peer has passed.
struct PassedDescriptor {
  Descriptor file;
  Held<DescriptorsOfPeers> held;
};

/// Bytes of peers' files that all connections of this process may have mapped: memory that two channels map counts twice, and what is
/// beyond would take page tables and addresses without end.
[[nodiscard]] std::uint64_t most_mapped_bytes() noexcept;

/// A peer's file in memory, mapped for reading. Nothing that the peer does to it can make an access fault: see `map`.
class MappedFile {
 public:
  /// It stays as long as it is, with all pages that it has, and nobody but its owner writes to it.
  static constexpr int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;

  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept
      : file_(std::move(other.file_)),
        held_(std::move(other.held_)),
        data_(std::exchange(other.data_, nullptr)),
        size_(other.size_) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(file_, other.file_);
    std::swap(held_, other.held_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~MappedFile();

  /// Maps the first `size` bytes. Believes nothing that the peer has said of the file.
  /// @param most bytes that all of the process may have mapped.
  /// @return an errno: ENOMEM beyond that; EINVAL if the file is shorter, no file in memory, not sealed, or has holes, which are filled by
  ///   whoever reads there first, if there is memory.
  /// @param keep whether the descriptor is kept where it isn't needed for `descriptor`'s reason.
  enum class Keep { mapping, file };
  [[nodiscard]] static int map(PassedDescriptor passed, std::uint64_t size, MappedFile& mapped,
                               std::uint64_t most = most_mapped_bytes(), Keep keep = Keep::mapping);

  [[nodiscard]] const std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  /// Of the file, if it is kept: where it was asked for, or the kernel refuses process_vm_readv(2), which copies out of the mapping as
  /// well; else -1.
  [[nodiscard]] int descriptor() const noexcept { return file_.file.get(); }

 private:
  struct Mapped {};

  PassedDescriptor file_;
  Held<Mapped> held_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace kvferry::shm
