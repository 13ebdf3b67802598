// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/kit/region_list.hpp>
#include <kvferry/tcp/peer_memory.hpp>
#include "protocol_harness.hpp"

namespace kvferry::inline KVFERRY_ABI::tcp::testing {

/// The memory of the other end of a connection without the connection: a block of this process, whose first byte has the address
/// `begin`. Regions aren't read through it.
class PeerBlock final : public PeerMemory {
 public:
  /// @param refers whether the other end fetches as well.
  explicit PeerBlock(bool refers) : refers_(refers) {}

  void is(std::span<const std::byte> block, std::uint64_t begin) {
    block_ = block;
    begin_ = begin;
  }
  [[nodiscard]] std::uint64_t fetched() const noexcept { return fetched_; }

  [[nodiscard]] bool fetches() const noexcept override { return true; }
  [[nodiscard]] bool refers() const noexcept override { return refers_; }
  [[nodiscard]] std::uint64_t least_bytes() const noexcept override { return 1; }
  [[nodiscard]] bool refer(std::span<const Reference>, std::uint64_t) override { return refers_; }

  [[nodiscard]] Fetched fetch(std::span<const Reference> from, std::span<const iovec> to, std::error_code&) override {
    std::vector<std::byte> bytes;
    bool readable = true;
    for (const Reference& reference : from) {
      const std::uint64_t offset = reference.address - begin_;
      const std::uint64_t there = offset < block_.size() ? std::min(block_.size() - offset, reference.length) : 0;
      const auto part = block_.subspan(there == 0 ? 0 : static_cast<std::size_t>(offset), there);
      bytes.insert(bytes.end(), part.begin(), part.end());
      if (there < reference.length) {
        readable = false;
        break;
      }
    }
    std::span<const std::byte> rest = bytes;
    for (const iovec& piece : to) {
      const auto part = rest.first(std::min(piece.iov_len, rest.size()));
      if (!part.empty()) {
        std::memcpy(piece.iov_base, part.data(), part.size());
      }
      rest = rest.subspan(part.size());
    }
    fetched_ += bytes.size();
    return readable ? Fetched::all : Fetched::unreadable;
  }

  [[nodiscard]] std::optional<Share> share(const LocalRegion&) override { return std::nullopt; }
  [[nodiscard]] bool mapped_by_peer(std::uint32_t, std::uint32_t) override { return false; }
  void unshare(std::uint32_t) override {}
  [[nodiscard]] std::uint32_t map(const RemoteRegion&, const Share&) override { return EOPNOTSUPP; }
  void unmap(std::uint32_t) override {}
  [[nodiscard]] const kit::RegionList& regions(Way) const noexcept override { return none_; }
  [[nodiscard]] bool reads(std::uint32_t) const noexcept override { return false; }
  [[nodiscard]] Fetched copy(Way, std::span<const iovec>, std::span<const iovec>, std::error_code&) override {
    return Fetched::unreadable;
  }
  [[nodiscard]] std::string path() const override { return "a test's"; }

 private:
  const bool refers_;
  std::span<const std::byte> block_;
  std::uint64_t begin_ = 0;
  std::uint64_t fetched_ = 0;
  const kit::RegionList none_{{}, 0, 0};
};

/// How payload travels.
struct Travel {
  bool checked = false;   ///< With checksums.
  bool referred = false;  ///< Its receiver fetches it.
};
inline constexpr std::array<Travel, 4> all_travels{{{}, {true, false}, {false, true}, {true, true}}};

/// Two ends between which payload travels in one way.
class Ends {
 public:
  explicit Ends(Travel travel)
      : travel_(travel),
        of_a_(travel.referred ? std::make_shared<PeerBlock>(true) : nullptr),
        of_b_(travel.referred ? std::make_shared<PeerBlock>(true) : nullptr),
        a(Side::pages, of_b_),
        b(Side::pages, of_a_) {
    if (travel.referred) {
      of_a_->is(a.memory, reinterpret_cast<std::uintptr_t>(a.memory.data()));
      of_b_->is(b.memory, reinterpret_cast<std::uintptr_t>(b.memory.data()));
    }
  }

  [[nodiscard]] TransferRequest prepared(TransferRequest request) const {
    request.checksums = travel_.checked;
    return request;
  }
  /// Bytes that either end has fetched from the other.
  [[nodiscard]] std::uint64_t fetched() const { return of_a_ ? of_a_->fetched() + of_b_->fetched() : 0; }

 private:
  const Travel travel_;
  const std::shared_ptr<PeerBlock> of_a_;
  const std::shared_ptr<PeerBlock> of_b_;

 public:
  Side a;
  Side b;
};

}  // namespace kvferry::tcp::testing
