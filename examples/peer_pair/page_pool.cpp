// SPDX-License-Identifier: Apache-2.0
#include "page_pool.hpp"

#include <fmt/core.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <numeric>
#include <random>
#include <stdexcept>
#include <system_error>

#include "exit_code.hpp"

namespace example {

PagePool::PagePool(std::size_t page_size, std::size_t page_count, std::uint64_t shuffle_seed)
    : page_size_(page_size), page_count_(page_count) {
  // MAP_POPULATE: a server's pages were touched long before a cache arrives, so that no transfer waits for page faults.
  const auto size = page_size * page_count;
  void* mapped = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (mapped == MAP_FAILED) {
    throw Failure(ExitCode::no_file_or_memory,
                  fmt::format("no memory for a pool of {} pages of {} bytes: {}", page_count, page_size,
                              std::generic_category().message(errno)));
  }
  memory_ = {static_cast<std::byte*>(mapped), Unmap{size}};

  free_.resize(page_count);
  std::iota(free_.begin(), free_.end(), 0);
  std::shuffle(free_.begin(), free_.end(), std::mt19937_64(shuffle_seed));
}

void PagePool::Unmap::operator()(std::byte* memory) const noexcept { ::munmap(memory, size); }

std::vector<std::uint64_t> PagePool::take(std::size_t count) {
  if (count > free_.size()) {
    throw std::length_error(fmt::format("the pool has {} free pages, not {}", free_.size(), count));
  }
  const auto first = free_.end() - static_cast<std::ptrdiff_t>(count);
  std::vector<std::uint64_t> taken(first, free_.end());
  free_.erase(first, free_.end());
  return taken;
}

}  // namespace example
