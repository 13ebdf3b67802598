// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fcntl.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include <kvferry/config.hpp>
#include <kvferry/detail/descriptor.hpp>
#include <kvferry/detail/process.hpp>
#include <kvferry/shm/held.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

struct DescriptorsOfPeers {};
/// A descriptor that a peer has passed.
struct PassedDescriptor {
  Descriptor file;
  Held<DescriptorsOfPeers> held;
};

/// The most bytes of peers' files that all connections of this process may have mapped. Memory that two channels map
/// counts twice. The limit bounds page tables and addresses.
[[nodiscard]] std::uint64_t most_mapped_bytes() noexcept;

/// A peer's file in memory, mapped for reading. Nothing that the peer does to it can make an access fault: see `map`.
class MappedFile {
 public:
  /// These seals: the file keeps its size and all of its pages, and only its owner can write to it.
  static constexpr int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL;

  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept
      : origin_(other.origin_),
        file_(std::move(other.file_)),
        held_(std::move(other.held_)),
        data_(std::exchange(other.data_, nullptr)),
        size_(other.size_) {}
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(origin_, other.origin_);
    std::swap(file_, other.file_);
    std::swap(held_, other.held_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~MappedFile();

  /// Maps the first `size` bytes. Doesn't trust the peer's statements about the file.
  /// @param most the most bytes that the whole process may have mapped.
  /// @param keep whether to keep the descriptor even if `descriptor` doesn't need it.
  /// @return an errno: ENOMEM beyond `most`; EINVAL if the file is shorter, is no file in memory, isn't sealed, or has
  ///   holes. (The first reader of a hole fills it, if there is memory.)
  enum class Keep { mapping, file };
  [[nodiscard]] static int map(PassedDescriptor passed, std::uint64_t size, MappedFile& mapped,
                               std::uint64_t most = most_mapped_bytes(), Keep keep = Keep::mapping);

  [[nodiscard]] const std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  /// The file's descriptor, if it is kept: because `map` was asked to, or because the kernel refuses
  /// process_vm_readv(2), which would copy out of the mapping; else -1.
  [[nodiscard]] int descriptor() const noexcept { return file_.file.get(); }

 private:
  struct Mapped {};

  ProcessOfOrigin origin_;  ///< Of the mapping, which no child gets.
  PassedDescriptor file_;
  Held<Mapped> held_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace kvferry::shm
