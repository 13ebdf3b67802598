// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/read_ahead.hpp>

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

/// Address space, of which memory is taken for what is in use only.
inline constexpr std::size_t buffers_in_a_file = 1024;
inline constexpr std::size_t page = 4096;

[[noreturn]] KVFERRY_INLINE void refuse(const char* what) {
  throw std::system_error(errno, std::system_category(), what);
}

}  // namespace internal

KVFERRY_INLINE ReadAhead ReadAhead::unprotected(std::size_t size) {
  ReadAhead made;
  made.data_ = std::shared_ptr<std::byte>(new std::byte[size], std::default_delete<std::byte[]>());
  made.size_ = size;
  return made;
}

KVFERRY_INLINE bool ReadAhead::copy_to(std::span<const iovec> pieces, std::size_t offset,
                                       std::size_t bytes) const noexcept {
  if (descriptor_ < 0) {
    const std::byte* from = data_.get() + offset;
    for (const iovec& piece : pieces) {
      std::memcpy(piece.iov_base, from, piece.iov_len);
      from += piece.iov_len;
    }
    return true;
  }
  const auto copied =
      ::preadv(descriptor_, pieces.data(), static_cast<int>(pieces.size()), static_cast<off_t>(file_offset_ + offset));
  return copied == static_cast<ssize_t>(bytes);
}

KVFERRY_INLINE bool ReadAhead::can_read(std::span<const iovec> pieces) const noexcept {
  if (descriptor_ < 0) {
    return true;
  }
  return kernel_can_read(pieces, descriptor_, file_offset_ + size_);
}

KVFERRY_INLINE std::shared_ptr<ReadAheadPool> ReadAheadPool::create(std::size_t buffer_size) {
  std::shared_ptr<ReadAheadPool> pool(new ReadAheadPool(buffer_size));
  pool->grow();
  return pool;
}

KVFERRY_INLINE ReadAheadPool::ReadAheadPool(std::size_t buffer_size)
    // Behind a buffer is room for what the kernel is to look at.
    : size_(buffer_size), stride_((buffer_size + looked_at_once + page - 1) / page * page) {}

KVFERRY_INLINE ReadAheadPool::~ReadAheadPool() {
  for (const auto& file : files_) {
    ::munmap(file->memory, buffers_in_a_file * stride_);
    ::close(file->descriptor);
  }
}

KVFERRY_INLINE ReadAhead ReadAheadPool::take() {
  Place place{};
  {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) {
      grow();
    }
    place = free_.back();
    free_.pop_back();
  }
  ReadAhead taken;
  taken.data_ =
      std::shared_ptr<std::byte>(place.file->memory + place.offset, [pool = shared_from_this(), place](std::byte*) {
        const std::lock_guard returning(pool->mutex_);
        pool->free_.push_back(place);
      });
  taken.size_ = size_;
  taken.descriptor_ = place.file->descriptor;
  taken.file_offset_ = place.offset;
  return taken;
}

KVFERRY_INLINE void ReadAheadPool::grow() {
  const std::size_t bytes = buffers_in_a_file * stride_;
  free_.reserve((files_.size() + 1) * buffers_in_a_file);  // so that what comes back always has room
  auto file = std::make_unique<File>();
  file->descriptor = ::memfd_create("kvferry", MFD_CLOEXEC);
  if (file->descriptor < 0) {
    refuse("memfd_create");
  }
  void* const memory = ::ftruncate(file->descriptor, static_cast<off_t>(bytes)) != 0
                           ? MAP_FAILED
                           : ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file->descriptor, 0);
  if (memory == MAP_FAILED) {
    const int error = errno;
    ::close(file->descriptor);
    errno = error;
    refuse("mapping buffers for reads");
  }
  file->memory = static_cast<std::byte*>(memory);
  files_.push_back(std::move(file));
  for (std::size_t i = 0; i < buffers_in_a_file; ++i) {
    free_.push_back({files_.back().get(), i * stride_});
  }
}

}  // namespace kvferry::tcp
