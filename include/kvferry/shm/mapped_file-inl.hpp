// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/shm/mapped_file.hpp>

#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

namespace kvferry::inline KVFERRY_ABI::shm {

KVFERRY_INLINE std::uint64_t most_mapped_bytes() noexcept {
  constexpr std::uint64_t times_memory = 8;
  return times_memory * static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) *
         static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

KVFERRY_INLINE MappedFile::~MappedFile() {
  if (data_ != nullptr && !origin_.was_forked()) {
    ::munmap(const_cast<std::byte*>(data_), size_);
  }
}

KVFERRY_INLINE int MappedFile::map(PassedDescriptor passed, std::uint64_t size, MappedFile& mapped,
                                   std::uint64_t most, Keep keep) {
  const Descriptor& file = passed.file;
  // The seals come first: what holds then holds for good.
  const int present = ::fcntl(file.get(), F_GET_SEALS);
  struct stat status {};
  struct statfs system {};
  if (present < 0 || ::fstat(file.get(), &status) != 0 || ::fstatfs(file.get(), &system) != 0) {
    return errno;
  }
  const auto length = static_cast<std::uint64_t>(status.st_size);
  if ((present & seals) != seals || !S_ISREG(status.st_mode) || size == 0 || size > length ||
      size > std::numeric_limits<std::size_t>::max()) {
    return EINVAL;
  }
  // A count of its blocks would count those behind its end. Of files of huge pages the kernel doesn't tell where they have holes.
  const bool huge = system.f_type == HUGETLBFS_MAGIC;
  if (!huge && ::lseek(file.get(), 0, SEEK_HOLE) < status.st_size) {
    return EINVAL;
  }
  // Whole pages, of whatever size: huge ones can't be unmapped in part.
  const auto page = static_cast<std::uint64_t>(status.st_blksize);
  const auto bytes = static_cast<std::size_t>(std::min(length, (size + page - 1) / page * page));
  auto held = Held<Mapped>::take(bytes, most);
  if (!held) {
    return ENOMEM;
  }
  void* const memory = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file.get(), 0);
  if (memory == MAP_FAILED) {
    return errno;
  }
  if (huge && ::madvise(memory, bytes, MADV_POPULATE_READ) != 0) {
    ::munmap(memory, bytes);
    return EINVAL;
  }
  // It is neither for this process's children, which would keep it, nor for a report of its crash.
  (void)::madvise(memory, bytes, MADV_DONTFORK);
  (void)::madvise(memory, bytes, MADV_DONTDUMP);
  MappedFile made;
  made.held_ = std::move(*held);
  made.data_ = static_cast<const std::byte*>(memory);
  made.size_ = bytes;
  // A child of this process would keep the memory by the descriptor as well.
  std::byte copied{};
  const iovec to{&copied, 1};
  const iovec from{memory, 1};
  if (keep == Keep::file || ::process_vm_readv(::gettid(), &to, 1, &from, 1, 0) != 1) {
    made.file_ = std::move(passed);
  }
  mapped = std::move(made);
  return 0;
}

}  // namespace kvferry::shm
