// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/shared_region.hpp>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <limits>
#include <string>
#include <system_error>
#include <utility>

#include <kvferry/detail/descriptor.hpp>
#include <kvferry/detail/thread.hpp>
#include <kvferry/error.hpp>
#include <kvferry/shm/mapped_file.hpp>
#include <kvferry/shm/shared_areas.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

/// Bytes of the pages that a region is made of.
KVFERRY_INLINE std::size_t bytes_of_page(HugePages huge_pages) {
  if (huge_pages == HugePages::no) {
    return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  }
  std::ifstream file("/proc/meminfo");
  std::string name;
  std::size_t kibibytes = 0;
  while (file >> name) {
    if (name == "Hugepagesize:" && file >> kibibytes && kibibytes != 0) {
      return kibibytes << 10;
    }
  }
  throw TransferError({ENOSYS, std::system_category()}, "the kernel has no huge pages");
}

}  // namespace internal

KVFERRY_INLINE SharedRegion::SharedRegion(std::size_t size, HugePages huge_pages) : size_(size) {
  const bool huge = huge_pages == HugePages::yes;
  const std::size_t page = bytes_of_page(huge_pages);
  constexpr auto most = static_cast<std::size_t>(std::numeric_limits<off_t>::max());
  if (size == 0 || size > most - page) {
    throw TransferError(errc::invalid_region, "shared region of " + std::to_string(size) + " bytes");
  }
  mapped_ = (size + page - 1) / page * page;
  const auto what = [&] {
    return "shared region of " + std::to_string(size) + " bytes" +
           (huge ? ", in " + std::to_string(mapped_ / page) + " huge pages of " + std::to_string(page) +
                       " bytes (vm.nr_hugepages is how many there are)"
                 : "");
  };
  const auto refused = [&](const std::string& call, int number) {
    throw TransferError({number, std::system_category()}, what() + ": " + call);
  };
  Descriptor writable(::memfd_create("kvferry", MFD_CLOEXEC | MFD_ALLOW_SEALING | (huge ? MFD_HUGETLB : 0U)));
  if (!writable) {
    refused("memfd_create", errno);
  }
  // Beyond it the system sends a signal that ends the process.
  if (rlimit files{}; ::getrlimit(RLIMIT_FSIZE, &files) == 0 && mapped_ > files.rlim_cur) {
    refused("RLIMIT_FSIZE is " + std::to_string(files.rlim_cur) + " bytes", EFBIG);
  }
  // The kernel would give it all that there is, and then end processes until it finds some more.
  if (struct sysinfo host{}; !huge && ::sysinfo(&host) == 0) {
    const std::uint64_t all = (std::uint64_t{host.totalram} + host.totalswap) * host.mem_unit;
    if (mapped_ > all) {
      refused("this host has " + std::to_string(all) + " bytes of memory", ENOMEM);
    }
  }
  if (::ftruncate(writable.get(), static_cast<off_t>(mapped_)) != 0) {
    refused("ftruncate", errno);
  }
  // All pages are there from here on: what is touched later can't be missing. A signal may end the call, which takes back what
  // it has done. In parts, so that none waits for long.
  constexpr std::size_t most_at_once = std::size_t{1} << 24;
  for (std::size_t done = 0; done < mapped_;) {
    const SignalsBlocked blocked;
    const std::size_t part = std::min(mapped_ - done, std::max(most_at_once, page));
    const int error = ::posix_fallocate(writable.get(), static_cast<off_t>(done), static_cast<off_t>(part));
    if (error == 0) {
      done += part;
    } else if (error != EINTR) {
      refused("fallocate", error);
    }
  }
  shm::SharedAreas::of_process().expect();
  void* const mapped = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, writable.get(), 0);
  if (mapped == MAP_FAILED) {
    refused("mmap", errno);
  }
  data_ = static_cast<std::byte*>(mapped);
  try {
    // With F_SEAL_FUTURE_WRITE this mapping is the last that can be written to, whoever opens the file anew.
    if (::fcntl(writable.get(), F_ADD_SEALS, shm::MappedFile::seals) != 0) {
      refused("sealing it", errno);
    }
    // Kernels before 5.13 take the seal for files of huge pages, and don't keep it.
    void* const writable_again = ::mmap(nullptr, page, PROT_READ | PROT_WRITE, MAP_SHARED, writable.get(), 0);
    if (writable_again != MAP_FAILED) {
      ::munmap(writable_again, page);
    }
    if (writable_again != MAP_FAILED ||
        ::fallocate(writable.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, static_cast<off_t>(page)) == 0) {
      refused("sealing it, which this kernel doesn't keep to", ENOSYS);
    }
    Descriptor readable(::open(("/proc/self/fd/" + std::to_string(writable.get())).c_str(), O_RDONLY | O_CLOEXEC));
    if (!readable) {
      // There is no /proc, or not for a process like this. Sealed, the other one is good for reading alone as well.
      readable = std::move(writable);
    }
    struct stat status {};
    if (::fstat(readable.get(), &status) != 0) {
      refused("fstat", errno);
    }
    const auto file = std::make_shared<const Descriptor>(std::move(readable));
    file_ = file;
    shm::SharedAreas::of_process().enter({data_, size_, file, status.st_ino});
  } catch (...) {
    ::munmap(mapped, mapped_);
    throw;
  }
}

KVFERRY_INLINE SharedRegion::SharedRegion(SharedRegion&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_(std::exchange(other.mapped_, 0)),
      file_(std::move(other.file_)) {}

KVFERRY_INLINE SharedRegion& SharedRegion::operator=(SharedRegion&& other) noexcept {
  if (this != &other) {
    release();
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    mapped_ = std::exchange(other.mapped_, 0);
    file_ = std::move(other.file_);
  }
  return *this;
}

KVFERRY_INLINE SharedRegion::~SharedRegion() { release(); }

KVFERRY_INLINE void SharedRegion::release() noexcept {
  if (data_ != nullptr) {
    try {
      shm::SharedAreas::of_process().leave(data_);
    } catch (const std::bad_alloc&) {
      // A forked child that has none of its own, and so nothing to leave.
    }
    ::munmap(data_, mapped_);
  }
}

}  // namespace kvferry
