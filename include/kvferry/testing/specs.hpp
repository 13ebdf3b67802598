// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <initializer_list>
#include <span>

#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// A spec for pages of the peer's region. It refers to the indexes.
[[nodiscard]] inline TransferSpec at(std::span<const std::uint64_t> indexes, std::uint32_t region = 0) {
  TransferSpec spec{};
  spec.remote_indexes = indexes;
  spec.remote_region = region;
  return spec;
}

/// As above; the list lives as long as the full expression that it is written in.
[[nodiscard]] inline TransferSpec at(std::initializer_list<std::uint64_t> indexes, std::uint32_t region = 0) {
  return at(std::span<const std::uint64_t>(indexes.begin(), indexes.size()), region);
}

/// A spec for a send or recv.
[[nodiscard]] inline TransferSpec tagged(std::uint64_t tag) {
  TransferSpec spec{};
  spec.tag = tag;
  return spec;
}

[[nodiscard]] constexpr bool is_one_sided(TransferKind kind) {
  return kind == TransferKind::write || kind == TransferKind::read;
}

/// A spec for a transfer of any kind: for pages if it is one-sided, else with a tag.
[[nodiscard]] inline TransferSpec spec_of(TransferKind kind, std::span<const std::uint64_t> indexes,
                                          std::uint64_t tag = 0) {
  return is_one_sided(kind) ? at(indexes) : tagged(tag);
}
/// As above; the list lives as long as the full expression that it is written in.
[[nodiscard]] inline TransferSpec spec_of(TransferKind kind, std::initializer_list<std::uint64_t> indexes,
                                          std::uint64_t tag = 0) {
  return is_one_sided(kind) ? at(indexes) : tagged(tag);
}

[[nodiscard]] inline TransferSpec within(std::chrono::milliseconds timeout, TransferSpec spec = {}) {
  spec.timeout = timeout;
  return spec;
}

/// A spec with a notification. It refers to the payload.
[[nodiscard]] inline TransferSpec notifying(std::span<const std::byte> payload, TransferSpec spec) {
  spec.notification = payload;
  return spec;
}

/// For writes to regions that peers can't read: over RDMA checksums need that right as well.
[[nodiscard]] inline TransferSpec without_checksums(TransferSpec spec) {
  spec.checksums = false;
  return spec;
}

}  // namespace kvferry::testing
