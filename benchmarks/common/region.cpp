// SPDX-License-Identifier: Apache-2.0
#include "region.hpp"

#include <fmt/core.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>

namespace bench {
namespace {

constexpr std::byte untouched{0xEE};

/// Word i of a source page; no two words of a region are alike, so a page that lands shifted is found out.
constexpr std::uint64_t word_of(std::uint64_t page, std::uint64_t i) {
  return (page + 1) * 0x9E3779B97F4A7C15U + i * 0xD6E8FEB86659FD93U;
}

/// The same for bytes that don't fill a word.
std::array<std::byte, 8> tail_of(std::uint64_t page, std::uint64_t i) {
  std::array<std::byte, 8> bytes{};
  const std::uint64_t word = word_of(page, i);
  std::memcpy(bytes.data(), &word, sizeof(word));
  return bytes;
}

void fill(std::span<std::byte> page, std::uint64_t key) {
  const std::size_t words = page.size() / 8;
  for (std::size_t i = 0; i < words; ++i) {
    const std::uint64_t word = word_of(key, i);
    std::memcpy(page.data() + 8 * i, &word, sizeof(word));
  }
  const auto tail = tail_of(key, words);
  std::memcpy(page.data() + 8 * words, tail.data(), page.size() % 8);
}

bool holds(std::span<const std::byte> page, std::uint64_t key) {
  const std::size_t words = page.size() / 8;
  std::uint64_t difference = 0;
  for (std::size_t i = 0; i < words; ++i) {
    std::uint64_t word = 0;
    std::memcpy(&word, page.data() + 8 * i, sizeof(word));
    difference |= word ^ word_of(key, i);
  }
  const auto tail = tail_of(key, words);
  return difference == 0 && std::ranges::equal(page.subspan(8 * words), std::span(tail).first(page.size() % 8));
}

bool is_untouched(std::span<const std::byte> page) {
  return std::ranges::all_of(page, [](std::byte byte) { return byte == untouched; });
}

}  // namespace

Region::Region(std::size_t pages, std::size_t page_size) : page_size_(page_size), size_(pages * page_size) {
  void* memory = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw std::system_error(errno, std::system_category(), fmt::format("a region of {} bytes", size_));
  }
  data_ = static_cast<std::byte*>(memory);
}

Region::~Region() { ::munmap(data_, size_); }

void Region::fill_as_source() const {
  for (std::size_t page = 0; page < size_ / page_size_; ++page) {
    fill(this->page(page), page);
  }
}

void Region::fill_as_destination() const { std::memset(data_, std::to_integer<int>(untouched), size_); }

std::optional<std::string> verify(const Region& destination, const PageMap& map, bool destination_is_target,
                                  std::span<const std::uint64_t> batches_moved) {
  for (std::size_t stream = 0; stream < batches_moved.size(); ++stream) {
    const std::uint64_t first_of_peer = map.peer_of(stream) * map.pages_per_peer();
    for (std::size_t batch = 0; batch < map.batches_per_stream(); ++batch) {
      const auto at_initiator = map.initiator_pages(stream, batch);
      const auto at_target = map.target_pages(stream, batch);
      for (std::size_t i = 0; i < at_target.size(); ++i) {
        const std::uint64_t in_target_region = first_of_peer + at_target[i];
        const auto from = destination_is_target ? at_initiator[i] : in_target_region;
        const auto to = destination_is_target ? in_target_region : at_initiator[i];
        const auto page = destination.page(to);
        if (batch < batches_moved[stream] ? !holds(page, from) : !is_untouched(page)) {
          return fmt::format("page {} of the destination does not hold {} (stream {}, batch {}, object {})", to,
                             batch < batches_moved[stream] ? fmt::format("page {} of the source", from)
                                                           : "what it held before, and nothing was moved there",
                             stream, batch, i);
        }
      }
    }
  }
  return std::nullopt;
}

}  // namespace bench
