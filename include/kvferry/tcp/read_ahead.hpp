// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include <kvferry/config.hpp>
#include <kvferry/detail/readable_memory.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

using kvferry::left_on_page;

class ReadAheadPool;

/// A buffer for bytes that come with a header. If it is from a pool, the kernel copies out of it: if the destination is not
/// mapped any more, the kernel's copy ends with EFAULT, while the CPU's own copy would end the process. For that, the buffer
/// is a mapping of a file in memory (preadv(2)), or, where the system makes no such file for this process, memory that
/// process_vm_readv(2) copies out of.
class KVFERRY_EXPORT ReadAhead {
 public:
  /// One that the CPU copies out of.
  [[nodiscard]] static ReadAhead unprotected(std::size_t size);

  [[nodiscard]] std::byte* data() noexcept { return data_.get(); }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }

  /// Copies `bytes` bytes from `offset` on to these pieces. @return false if one of them can't be written.
  [[nodiscard]] bool copy_to(std::span<const iovec> pieces, std::size_t offset, std::size_t bytes) const noexcept;

  /// Whether the CPU may read all of these pieces. A buffer from a pool has the kernel read a byte of each page of
  /// memory. Another one doesn't check, and answers yes.
  [[nodiscard]] bool can_read(std::span<const iovec> pieces) const noexcept;

 private:
  friend ReadAheadPool;

  enum class Way { cpu, file, process };

  std::shared_ptr<std::byte> data_;
  std::size_t size_ = 0;
  Way way_ = Way::cpu;
  int descriptor_ = -1;
  std::size_t file_offset_ = 0;
};

/// Makes the buffers of a channel's connections. Thread-safe.
class KVFERRY_EXPORT ReadAheadPool : public std::enable_shared_from_this<ReadAheadPool> {
 public:
  /// @throws std::system_error; where the system lets this process have neither a file in memory nor process_vm_readv(2), the
  ///   sentence names both.
  [[nodiscard]] static std::shared_ptr<ReadAheadPool> create(std::size_t buffer_size);
  ReadAheadPool(const ReadAheadPool&) = delete;
  ReadAheadPool& operator=(const ReadAheadPool&) = delete;
  ~ReadAheadPool();

  /// Goes back to the pool when the last copy of it is gone. @throws std::system_error
  [[nodiscard]] ReadAhead take();

 private:
  struct File {
    int descriptor = -1;  ///< -1: memory that is no file.
    std::byte* memory = nullptr;
  };
  struct Place {
    const File* file;
    std::size_t offset;
  };

  explicit ReadAheadPool(std::size_t buffer_size);
  void grow();

  const std::size_t size_;
  const std::size_t stride_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<File>> files_;
  std::vector<Place> free_;
};

}  // namespace kvferry::tcp
