// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "paged_cache.hpp"

namespace example {

/// Called between pages; throws to end the work.
using Checkpoint = std::function<void()>;

/// Fills the cache with bytes that depend on nothing but their offset.
void generate_content(const PagedCache& cache, const Checkpoint& checkpoint);

/// The size of a regular file. @throws Failure
[[nodiscard]] std::uint64_t file_size(const std::string& path);

/// Fills the cache from a file of at least as many bytes. @throws Failure
void load_file(const PagedCache& cache, const std::string& path, const Checkpoint& checkpoint);

/// Writes the cache to a file. @throws Failure
void save_file(const PagedCache& cache, const std::string& path, const Checkpoint& checkpoint);

/// Fault injection: flips a byte, if one is given. @throws Failure if the cache has no such byte.
void corrupt(const PagedCache& cache, std::optional<std::uint64_t> offset);

/// XXH3 (128 bits) of the cache's bytes, as 32 hexadecimal digits.
[[nodiscard]] std::string checksum(const PagedCache& cache, const Checkpoint& checkpoint);
inline constexpr std::size_t checksum_digits = 32;

}  // namespace example
