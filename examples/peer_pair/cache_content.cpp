// SPDX-License-Identifier: Apache-2.0
#include "cache_content.hpp"

#include <fmt/core.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <new>
#include <system_error>

#include "exit_code.hpp"

namespace example {
namespace {

Failure file_failure(const std::string& what, const std::string& path, const std::error_code& cause) {
  return {ExitCode::no_file_or_memory, fmt::format("cannot {} '{}': {}", what, path, cause.message())};
}

/// Streams keep the cause of a failure to themselves; errno has it.
std::error_code last_error() { return {errno != 0 ? errno : EIO, std::generic_category()}; }

/// SplitMix64's mixing function: neighbouring numbers become unrelated ones.
constexpr std::uint64_t mix(std::uint64_t value) noexcept {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

}  // namespace

void generate_content(const PagedCache& cache, const Checkpoint& checkpoint) {
  std::uint64_t word = 0;
  for (std::size_t number = 0; number < cache.page_count(); ++number) {
    checkpoint();
    auto left = cache.page(number);
    while (!left.empty()) {
      const std::uint64_t value = mix(word++);
      const auto size = std::min(left.size(), sizeof(value));
      std::memcpy(left.data(), &value, size);
      left = left.subspan(size);
    }
  }
}

std::uint64_t file_size(const std::string& path) {
  std::error_code ec;
  const auto size = std::filesystem::file_size(path, ec);
  if (ec) {
    throw file_failure("read", path, ec);
  }
  return size;
}

void load_file(const PagedCache& cache, const std::string& path, const Checkpoint& checkpoint) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  for (std::size_t number = 0; number < cache.page_count() && file; ++number) {
    checkpoint();
    const auto page = cache.page(number);
    file.read(reinterpret_cast<char*>(page.data()), static_cast<std::streamsize>(page.size()));
  }
  if (!file) {
    throw file_failure("read", path, last_error());
  }
}

void save_file(const PagedCache& cache, const std::string& path, const Checkpoint& checkpoint) {
  errno = 0;
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  for (std::size_t number = 0; number < cache.page_count() && file; ++number) {
    checkpoint();
    const auto page = cache.page(number);
    file.write(reinterpret_cast<const char*>(page.data()), static_cast<std::streamsize>(page.size()));
  }
  file.close();
  if (!file) {
    throw file_failure("write", path, last_error());
  }
}

void corrupt(const PagedCache& cache, std::optional<std::uint64_t> offset) {
  if (!offset.has_value()) {
    return;
  }
  if (*offset >= cache.bytes()) {
    throw Failure(ExitCode::bad_options,
                  fmt::format("--corrupt-byte: {} is not in a cache of {} bytes", *offset, cache.bytes()));
  }
  cache.at(*offset) ^= std::byte{1};
}

std::string checksum(const PagedCache& cache, const Checkpoint& checkpoint) {
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(), &XXH3_freeState);
  if (state == nullptr) {
    throw std::bad_alloc();
  }
  XXH3_128bits_reset(state.get());
  for (std::size_t number = 0; number < cache.page_count(); ++number) {
    checkpoint();
    const auto page = cache.page(number);
    XXH3_128bits_update(state.get(), page.data(), page.size());
  }
  const auto hash = XXH3_128bits_digest(state.get());
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

}  // namespace example
