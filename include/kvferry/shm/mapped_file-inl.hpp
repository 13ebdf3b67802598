// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/shm/mapped_file.hpp>

#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <limits>

namespace kvferry::inline KVFERRY_ABI::shm {

KVFERRY_INLINE MappedFile::~MappedFile() {
  if (data_ != nullptr) {
    ::munmap(const_cast<std::byte*>(data_), size_);  // NOLINT(cppcoreguidelines-pro-type-const-cast)
  }
}

KVFERRY_INLINE int MappedFile::map(Descriptor file, std::uint64_t size, MappedFile& mapped) {
  // The seals come first: what holds then holds for good.
  const int present = ::fcntl(file.get(), F_GET_SEALS);
  struct stat status {};
  if (present < 0 || ::fstat(file.get(), &status) != 0) {
    return errno;
  }
  constexpr std::uint64_t block = 512;  // of st_blocks
  const auto length = static_cast<std::uint64_t>(status.st_size);
  if ((present & seals) != seals || !S_ISREG(status.st_mode) || size == 0 || size > length ||
      size > std::numeric_limits<std::size_t>::max() || static_cast<std::uint64_t>(status.st_blocks) < length / block) {
    return EINVAL;
  }
  // Whole pages, of whatever size: huge ones can't be unmapped in part.
  const auto page = static_cast<std::uint64_t>(status.st_blksize);
  const auto bytes = static_cast<std::size_t>(std::min(length, (size + page - 1) / page * page));
  void* const memory = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file.get(), 0);
  if (memory == MAP_FAILED) {
    return errno;
  }
  MappedFile made;
  made.file_ = std::move(file);
  made.data_ = static_cast<const std::byte*>(memory);
  made.size_ = bytes;
  mapped = std::move(made);
  return 0;
}

}  // namespace kvferry::shm
