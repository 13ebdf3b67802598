// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/read_ahead.hpp>

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>
#include <utility>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

/// Address space, of which memory is taken for what is in use only.
inline constexpr std::size_t buffers_in_a_file = 1024;
inline constexpr std::size_t page = 4096;

[[noreturn]] KVFERRY_INLINE void refuse(const std::string& what) {
  throw std::system_error(errno, std::system_category(), what);
}

/// @param what becomes what failed. @return -1, with errno, if there is none.
KVFERRY_INLINE int make_file_in_memory(std::size_t bytes, std::string& what) {
  what = "memfd_create";
  const int made = ::memfd_create("kvferry", MFD_CLOEXEC);
  if (made < 0) {
    return -1;
  }
  // Beyond it the system sends a signal that ends the process.
  rlimit files{};
  if (::getrlimit(RLIMIT_FSIZE, &files) == 0 && bytes > files.rlim_cur) {
    what = "RLIMIT_FSIZE is " + std::to_string(files.rlim_cur) + " bytes, for a file in memory of " +
           std::to_string(bytes);
    errno = EFBIG;
  } else if (::ftruncate(made, static_cast<off_t>(bytes)) == 0) {
    return made;
  } else {
    what = "ftruncate of a file in memory";
  }
  const int error = errno;
  ::close(made);
  errno = error;
  return -1;
}

/// Whether the kernel copies within this process.
KVFERRY_INLINE bool kernel_copies() noexcept {
  std::byte from{};
  std::byte to{};
  const iovec here{&from, 1};
  const iovec there{&to, 1};
  return ::process_vm_readv(::gettid(), &here, 1, &there, 1, 0) == 1 &&
         ::process_vm_writev(::gettid(), &here, 1, &there, 1, 0) == 1;
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
  std::byte* from = data_.get() + offset;
  ssize_t copied = 0;
  switch (way_) {
    case Way::cpu:
      for (const iovec& piece : pieces) {
        std::memcpy(piece.iov_base, from, piece.iov_len);
        from += piece.iov_len;
      }
      return true;
    case Way::file:
      copied = ::preadv(descriptor_, pieces.data(), static_cast<int>(pieces.size()),
                        static_cast<off_t>(file_offset_ + offset));
      break;
    case Way::process: {
      const iovec source{from, bytes};
      copied = ::process_vm_readv(::gettid(), pieces.data(), pieces.size(), &source, 1, 0);
      break;
    }
  }
  return copied == static_cast<ssize_t>(bytes);
}

KVFERRY_INLINE bool ReadAhead::can_read(std::span<const iovec> pieces) const noexcept {
  if (way_ == Way::cpu) {
    return true;
  }
  return kernel_can_read(pieces, [this](std::span<const iovec> bytes) {
    const auto count = static_cast<int>(bytes.size());
    const iovec behind{data_.get() + size_, bytes.size()};
    return way_ == Way::file ? ::pwritev(descriptor_, bytes.data(), count, static_cast<off_t>(file_offset_ + size_))
                             : ::process_vm_writev(::gettid(), bytes.data(), bytes.size(), &behind, 1, 0);
  });
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
    if (file->descriptor >= 0) {
      ::close(file->descriptor);
    }
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
  taken.way_ = place.file->descriptor < 0 ? ReadAhead::Way::process : ReadAhead::Way::file;
  taken.descriptor_ = place.file->descriptor;
  taken.file_offset_ = place.offset;
  return taken;
}

KVFERRY_INLINE void ReadAheadPool::grow() {
  const std::size_t bytes = buffers_in_a_file * stride_;
  free_.reserve((files_.size() + 1) * buffers_in_a_file);  // so that what comes back always has room
  auto file = std::make_unique<File>();
  std::string what;
  file->descriptor = make_file_in_memory(bytes, what);
  const bool is_file = file->descriptor >= 0;
  if (const int error = errno; !is_file && !kernel_copies()) {
    const auto why = [](int number) { return " (" + std::generic_category().message(number) + ")"; };
    what += why(error) + ", and in its place process_vm_readv and process_vm_writev" + why(errno);
    errno = error;
    refuse(what);
  }
  void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                              is_file ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, file->descriptor, 0);
  if (memory == MAP_FAILED) {
    const int error = errno;
    if (is_file) {
      ::close(file->descriptor);
    }
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
