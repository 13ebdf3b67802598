// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/checksums.hpp>

#include <algorithm>
#include <bit>

#include <kvferry/detail/fetch_ahead.hpp>
#include <kvferry/detail/xxh3.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

/// Takes bytes out of pieces of memory, one run behind the other.
class RunsOfBytes {
 public:
  explicit RunsOfBytes(std::span<const iovec> memory) noexcept : left_(memory) {}

  /// The checksum of the next `length` bytes.
  [[nodiscard]] std::uint64_t sum_of_next(std::size_t length) noexcept {
    const auto from = left_;
    const std::size_t skipped = used_;
    skip(length);
    if (!left_.empty()) {
      fetch_ahead(static_cast<const std::byte*>(left_.front().iov_base) + used_, left_.front().iov_len - used_);
    }
    return xxh3_of(from, skipped, length);
  }

 private:
  void skip(std::size_t length) noexcept {
    while (!left_.empty() && length >= left_.front().iov_len - used_) {
      length -= left_.front().iov_len - used_;
      left_ = left_.subspan(1);
      used_ = 0;
    }
    used_ += left_.empty() ? 0 : length;
  }

  std::span<const iovec> left_;
  std::size_t used_ = 0;
};

/// The bytes, counted over all pieces, of those that share memory with another one.
KVFERRY_INLINE std::vector<std::pair<std::uint64_t, std::uint64_t>> overlapping(std::span<const iovec> memory) {
  struct Piece {
    const std::byte* begin;
    const std::byte* end;
    std::uint64_t at;
    bool overlaps;
  };
  std::vector<Piece> pieces;
  std::uint64_t at = 0;
  for (const iovec& piece : memory) {
    const auto* begin = static_cast<const std::byte*>(piece.iov_base);
    pieces.push_back({begin, begin + piece.iov_len, at, false});
    at += piece.iov_len;
  }
  std::ranges::sort(pieces, {}, &Piece::begin);
  Piece* longest = nullptr;  // of those so far, the one that reaches furthest
  for (Piece& piece : pieces) {
    if (longest != nullptr && piece.begin < longest->end) {
      piece.overlaps = longest->overlaps = true;
    }
    if (longest == nullptr || piece.end > longest->end) {
      longest = &piece;
    }
  }
  std::erase_if(pieces, [](const Piece& piece) { return !piece.overlaps; });
  std::ranges::sort(pieces, {}, &Piece::at);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> bytes;
  bytes.reserve(pieces.size());
  for (const Piece& piece : pieces) {
    bytes.emplace_back(piece.at, piece.at + static_cast<std::uint64_t>(piece.end - piece.begin));
  }
  return bytes;
}

}  // namespace internal

KVFERRY_INLINE void take_checksums(std::span<const iovec> memory, std::span<Checksum> checksums) noexcept {
  RunsOfBytes runs(memory);
  for (Checksum& checksum : checksums) {
    checksum.sum = runs.sum_of_next(static_cast<std::size_t>(checksum.length));
  }
}

KVFERRY_INLINE std::vector<std::size_t> differing_checksums(std::span<const iovec> memory,
                                                            std::span<const Checksum> checksums) {
  std::vector<std::size_t> differing;
  RunsOfBytes runs(memory);
  for (std::size_t i = 0; i < checksums.size(); ++i) {
    // Of no bytes there is nothing that could differ.
    if (checksums[i].length != 0 &&
        runs.sum_of_next(static_cast<std::size_t>(checksums[i].length)) != checksums[i].sum) {
      differing.push_back(i);
    }
  }
  if (differing.empty()) {
    return differing;
  }
  const auto overwritten = overlapping(memory);
  auto next = overwritten.begin();
  std::vector<std::size_t> found;
  auto candidate = differing.begin();
  std::uint64_t begin = 0;
  for (std::size_t i = 0; i < checksums.size() && candidate != differing.end(); ++i) {
    const std::uint64_t end = begin + checksums[i].length;
    if (i == *candidate) {
      ++candidate;
      while (next != overwritten.end() && next->second <= begin) {
        ++next;
      }
      if (next == overwritten.end() || next->first >= end) {
        found.push_back(i);
      }
    }
    begin = end;
  }
  return found;
}

KVFERRY_INLINE ObjectSet::ObjectSet(std::span<const Descriptor> descriptors) noexcept {
  for (std::size_t i = 0; i < descriptors.size(); ++i) {
    words_[2 * i] = descriptors[i].index;
    words_[2 * i + 1] = descriptors[i].length;
  }
}

KVFERRY_INLINE std::vector<Descriptor> ObjectSet::descriptors(std::size_t objects) const {
  std::vector<Descriptor> made(descriptors_for(objects));
  for (std::size_t i = 0; i < made.size(); ++i) {
    made[i] = {words_[2 * i], words_[2 * i + 1]};
  }
  return made;
}

KVFERRY_INLINE CoveredBytes::CoveredBytes(std::span<const Checksum> checksums, std::span<const std::size_t> numbers) {
  std::uint64_t begin = 0;
  auto number = numbers.begin();
  for (std::size_t i = 0; i < checksums.size() && number != numbers.end(); ++i) {
    const std::uint64_t end = begin + checksums[i].length;
    if (i == *number) {
      covered_.emplace_back(begin, end);
      ++number;
    }
    begin = end;
  }
}

KVFERRY_INLINE bool CoveredBytes::in_next(std::uint64_t length) noexcept {
  const std::uint64_t begin = std::exchange(at_, at_ + length);
  while (head_ < covered_.size() && covered_[head_].second <= begin) {
    ++head_;
  }
  return length != 0 && head_ < covered_.size() && covered_[head_].first < at_;
}

}  // namespace kvferry::tcp
