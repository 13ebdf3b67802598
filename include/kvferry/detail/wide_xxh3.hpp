// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

#include <kvferry/config.hpp>

// A program is compiled for the oldest CPU that it is to run on. With the vectors of such a CPU, XXH3 takes more than
// twice as long as with newer ones. So the compiled library has a version for each (src/xxh3_*.cpp), and takes the one
// for the CPU that it runs on. With headers alone, the program's own flags decide (-march).
namespace kvferry::inline KVFERRY_ABI {

/// `xxh3_of` for CPUs with AVX2.
[[nodiscard]] std::uint64_t xxh3_avx2(const iovec* pieces, std::size_t count, std::size_t skipped,
                                      std::size_t length) noexcept;
/// The same for CPUs with AVX-512.
[[nodiscard]] std::uint64_t xxh3_avx512(const iovec* pieces, std::size_t count, std::size_t skipped,
                                        std::size_t length) noexcept;

}  // namespace kvferry
