// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_CHECKS_HPP
#define KVFERRY_KIT_CHECKS_HPP

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <kvferry/channel_options.hpp>
#include <kvferry/kit/link.hpp>
#include <kvferry/transfer_spec.hpp>

#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/init_messages.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// @throws TransferError `errc::invalid_region`.
void check_regions(std::span<const MemoryRegion> regions);
/// @param name for the sentence. @throws TransferError `errc::invalid_region`.
void check_region(const MemoryRegion& region, const std::string& name);

/// For transports that move bytes by the CPU. @throws TransferError `errc::not_supported` for memory of a device.
void refuse_dmabuf(const LocalRegion& region, std::string_view transport);
void refuse_dmabufs(std::span<const MemoryRegion> regions, std::string_view transport);

/// Checks the id of a channel. @param whose its name in the sentence.
[[nodiscard]] Failure check_id(std::string_view id, std::string_view whose);

/// Checks a transfer as far as possible before its peer is looked up.
[[nodiscard]] Failure check_request(const TransferRequest& request, const Capabilities& capabilities);

/// Checks a one-sided transfer against the peer's regions.
/// @param paged the regions that this channel was made with, whose page sizes must equal those of the regions of their
///   numbers that the peer's channel was made with, where pages are named by index.
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

/// Checks the numbers of a peer's regions, as its handshake has them.
[[nodiscard]] Failure check_region_numbers(const std::string& peer, std::size_t regions,
                                           const std::optional<std::vector<std::uint64_t>>& numbers,
                                           const std::optional<std::uint64_t>& next,
                                           const std::optional<std::uint64_t>& given);

[[nodiscard]] std::vector<RegionTuple> describe_regions(std::span<const LocalRegion> regions);
/// Of regions that are numbered as they come.
[[nodiscard]] std::vector<RemoteRegion> read_regions(const std::vector<RegionTuple>& regions);

/// Fills in this channel's regions in a handshake's message.
template <class Message>
void describe_regions(const RegionList& list, Message& message) {
  message.regions = describe_regions(list.all());
  message.region_numbers.reset();
  message.next_region.reset();
  message.given_regions.reset();
  if (list.given() != list.next()) {
    message.given_regions = list.given();
  }
  if (list.next() != list.all().size()) {
    std::vector<std::uint64_t> numbers;
    for (const LocalRegion& region : list.all()) {
      numbers.push_back(region.number);
    }
    message.region_numbers = std::move(numbers);
    message.next_region = list.next();
  }
}

/// Takes the peer's regions out of a checked handshake message.
template <class Message>
void read_regions(const Message& message, PeerDescription& peer) {
  peer.regions = read_regions(message.regions);
  for (std::size_t i = 0; message.region_numbers && i < peer.regions.size(); ++i) {
    peer.regions[i].number = static_cast<std::uint32_t>((*message.region_numbers)[i]);
  }
  const std::uint32_t behind_all = peer.regions.empty() ? 0 : peer.regions.back().number + 1;
  peer.next_region = static_cast<std::uint32_t>(message.next_region.value_or(behind_all));
  peer.given_regions = static_cast<std::uint32_t>(message.given_regions.value_or(peer.next_region));
}

/// Why an operation can't begin on a connection that takes its sends and recvs by tag; no failure if it can.
[[nodiscard]] KVFERRY_EXPORT Failure refusal_of(const Operation& operation);

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_CHECKS_HPP
