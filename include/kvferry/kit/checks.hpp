// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_CHECKS_HPP
#define KVFERRY_KIT_CHECKS_HPP

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <kvferry/channel_options.hpp>
#include <kvferry/kit/link.hpp>
#include <kvferry/transfer_spec.hpp>

#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/init_messages.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// @throws TransferError `errc::invalid_region`.
void check_regions(std::span<const MemoryRegion> regions);

/// Checks the id of a channel. @param whose what the sentence calls it.
[[nodiscard]] Failure check_id(std::string_view id, std::string_view whose);

/// Checks a transfer as far as possible before its peer is looked up.
[[nodiscard]] Failure check_request(const TransferRequest& request, const Capabilities& capabilities);

/// Checks a one-sided transfer against the peer's regions.
/// @param paged own regions, whose page sizes those of the peer's must equal where pages are named by index.
[[nodiscard]] Failure check_against_peer(const TransferRequest& request, const PeerDescription& peer,
                                         std::span<const MemoryRegion> paged);

/// The facts that a peer's handshake must agree with.
struct LocalFacts {
  std::string_view transport;
  std::uint64_t incarnation = 0;
};

/// Checks version, transport, incarnation and regions of a peer's handshake message.
[[nodiscard]] Failure check_handshake(const LocalFacts& local, const std::string& peer, std::uint64_t version,
                                      const std::string& transport, std::uint64_t incarnation,
                                      const std::vector<RegionTuple>& regions);

[[nodiscard]] std::vector<RegionTuple> describe_regions(std::span<const MemoryRegion> regions);
[[nodiscard]] std::vector<RemoteRegion> read_regions(const std::vector<RegionTuple>& regions);

/// Why an operation can't begin on a connection that takes its sends and recvs by tag; no failure if it can.
[[nodiscard]] KVFERRY_EXPORT Failure refusal_of(const Operation& operation);

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_CHECKS_HPP
