// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include <kvferry/config.hpp>
#include <kvferry/tcp/frame.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {

/// The pieces that are given to a call at once. The kernel takes 1,024 (IOV_MAX), but the two lists of them stand on the
/// stack of the thread that copies, which may be a user's small one.
inline constexpr std::size_t most_pieces = 512;

/// A list of pieces of memory that is used up from its beginning.
template <class Entry>
class Pieces {
 public:
  explicit Pieces(std::span<const Entry> entries) noexcept : entries_(entries) { skip_used(); }

  [[nodiscard]] bool empty() const noexcept { return entries_.empty(); }
  [[nodiscard]] iovec front() const noexcept {
    return {static_cast<std::byte*>(begin(entries_.front())) + used_, length(entries_.front()) - used_};
  }
  /// Fills `out` with the next pieces, of at most `bytes` bytes in all. @return their number.
  [[nodiscard]] std::size_t next(std::span<iovec> out,
                                 std::size_t bytes = std::numeric_limits<std::size_t>::max()) const noexcept {
    std::size_t count = 0;
    for (; count < std::min(out.size(), entries_.size()) && bytes != 0; ++count) {
      out[count] = count == 0 ? front() : iovec{begin(entries_[count]), length(entries_[count])};
      out[count].iov_len = std::min(out[count].iov_len, bytes);
      bytes -= out[count].iov_len;
    }
    return count;
  }
  void use(std::size_t bytes) noexcept {
    used_ += bytes;
    skip_used();
  }

 private:
  static void* begin(const iovec& piece) noexcept { return piece.iov_base; }
  static std::size_t length(const iovec& piece) noexcept { return piece.iov_len; }
  static void* begin(const tcp::Reference& reference) noexcept {
    return reinterpret_cast<void*>(  // NOLINT(performance-no-int-to-ptr): another process's
        static_cast<std::uintptr_t>(reference.address));
  }
  static std::size_t length(const tcp::Reference& reference) noexcept {
    return static_cast<std::size_t>(reference.length);
  }
  void skip_used() noexcept {
    while (!entries_.empty() && used_ >= length(entries_.front())) {
      used_ -= length(entries_.front());
      entries_ = entries_.subspan(1);
    }
  }

  std::span<const Entry> entries_;
  std::size_t used_ = 0;  ///< Of the first one.
};

}  // namespace kvferry::shm
