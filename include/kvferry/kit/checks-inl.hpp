// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/checks.hpp>

#include <algorithm>
#include <functional>
#include <limits>

#include <kvferry/error.hpp>

#include <kvferry/detail/text.hpp>
#include <kvferry/kit/blocks.hpp>
#include <kvferry/kit/region_table.hpp>
#include <kvferry/kit/tag_matcher.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

inline constexpr std::size_t max_regions = RegionTable::max_regions;

KVFERRY_INLINE std::string text(std::uint64_t number) { return std::to_string(number); }

KVFERRY_INLINE Access needed_access(TransferKind kind) {
  return kind == TransferKind::write ? Access::write : Access::read;
}

KVFERRY_INLINE bool supported(TransferKind kind, const Capabilities& capabilities) {
  switch (kind) {
    case TransferKind::send:
    case TransferKind::recv: return capabilities.send_recv;
    case TransferKind::write: return capabilities.write;
    case TransferKind::read: return capabilities.read;
  }
  return false;
}

/// Whether the peer has the region and lets this kind of transfer in.
/// @param region becomes the region.
KVFERRY_INLINE Failure check_region(TransferKind kind, std::uint32_t number, const PeerDescription& peer,
                                    const RemoteRegion*& region) {
  region = find_region(peer.regions, number);
  if (region == nullptr && number < peer.next_region) {
    return {errc::region_gone, "the peer has removed its region " + text(number)};
  }
  if (region == nullptr) {
    return {errc::unknown_region, "remote region " + text(number) + ", the peer has " + text(peer.regions.size())};
  }
  if (!allows(region->access, needed_access(kind))) {
    return {errc::access_denied,
            "remote region " + text(number) + " does not allow peers to " + std::string(to_string(kind))};
  }
  return {};
}

/// Checks how an object lies in its buffer.
KVFERRY_INLINE Failure check_stride(std::size_t object, std::size_t buffer_size, const LocalStride& stride) {
  if (stride.block_size == 0 || buffer_size == 0 || buffer_size == stride.block_size) {
    return {};
  }
  const auto refused = [&](const char* why) -> Failure {
    return {errc::invalid_range, "object " + text(object) + ": a buffer of " + text(buffer_size) + " bytes, blocks of " +
                                     text(stride.block_size) + " bytes at a stride of " + text(stride.stride) +
                                     " bytes; " + why};
  };
  if (stride.stride < stride.block_size) {
    return refused("blocks may not overlap");
  }
  if (buffer_size < stride.block_size || (buffer_size - stride.block_size) % stride.stride != 0) {
    return refused("the buffer must end with a block");
  }
  return {};
}

KVFERRY_INLINE std::string describe(std::size_t object, const RemoteRange& range) {
  return "object " + text(object) + ": remote range of region " + text(range.region) + " at offset " +
         text(range.offset) + ", " + text(range.count) + " blocks of " + text(range.size) + " bytes at a stride of " +
         text(range.stride) + "; ";
}

/// Checks ranges and strides by themselves.
KVFERRY_INLINE Failure check_ranges(const TransferRequest& request, const Capabilities& capabilities) {
  const std::size_t count = request.objects.size();
  const auto& ranges = request.remote_ranges;
  const auto& strides = request.local_strides;
  if (!request.one_sided() || !capabilities.ranges) {
    return {errc::not_supported, !request.one_sided()
                                     ? "a " + std::string(to_string(request.kind)) + " takes no ranges and no strides"
                                     : "the transport takes no ranges and no strides"};
  }
  if (!ranges.empty() && !request.remote_indexes.empty()) {
    return {errc::invalid_range, text(ranges.size()) + " remote ranges and " + text(request.remote_indexes.size()) +
                                     " remote indexes; a transfer takes one or the other"};
  }
  if ((!ranges.empty() && ranges.size() != count) || (!strides.empty() && strides.size() != count)) {
    const bool of_ranges = !ranges.empty() && ranges.size() != count;
    return {errc::count_mismatch, text(count) + " objects, " + text(of_ranges ? ranges.size() : strides.size()) +
                                      (of_ranges ? " remote ranges" : " local strides")};
  }
  for (std::size_t i = 0; i < strides.size(); ++i) {
    if (Failure failure = check_stride(i, request.objects[i].size(), strides[i])) {
      return failure;
    }
  }
  const LocalBytes local(request);
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    const RemoteRange& range = ranges[i];
    if (range.count > 1 && range.stride < range.size) {
      return {errc::invalid_range, describe(i, range) + "blocks may not overlap"};
    }
    std::uint64_t bytes = 0;
    if (__builtin_mul_overflow(range.size, range.count, &bytes)) {
      return {errc::invalid_range, describe(i, range) + "that is more than 2^64 bytes"};
    }
    if (const std::size_t own = local.size(i); bytes != own) {
      return {errc::invalid_range, describe(i, range) + text(bytes) + " bytes in all, but the object has " + text(own)};
    }
  }
  return {};
}

/// Whether a range that has been checked by itself lies in a region of this size.
KVFERRY_INLINE bool lies_within(const RemoteRange& range, std::uint64_t region_size) {
  if (range.size == 0 || range.count == 0) {
    return range.offset <= region_size;
  }
  if (range.size > region_size || range.offset > region_size - range.size) {
    return false;
  }
  return range.count == 1 || range.count - 1 <= (region_size - range.size - range.offset) / range.stride;
}

KVFERRY_INLINE Failure check_ranges_against_peer(const TransferRequest& request, const PeerDescription& peer) {
  const RemoteRegion* region = nullptr;
  for (std::size_t i = 0; i < request.remote_ranges.size(); ++i) {
    const RemoteRange& range = request.remote_ranges[i];
    if (region == nullptr || range.region != request.remote_ranges[i - 1].region) {
      if (Failure failure = check_region(request.kind, range.region, peer, region)) {
        return {failure.code, "object " + text(i) + ": " + failure.sentence};
      }
    }
    if (!lies_within(range, region->size)) {
      return {errc::range_out_of_bounds, describe(i, range) + "the region has " + text(region->size) + " bytes"};
    }
  }
  return {};
}

}  // namespace internal

KVFERRY_INLINE void check_regions(std::span<const MemoryRegion> regions) {
  if (regions.size() > max_regions) {
    throw TransferError(errc::invalid_region, text(regions.size()) + " regions, at most " + text(max_regions));
  }
  for (std::size_t i = 0; i < regions.size(); ++i) {
    check_region(regions[i], "region " + text(i));
  }
}

KVFERRY_INLINE void check_region(const MemoryRegion& region, const std::string& name) {
  if (region.data == nullptr || region.size == 0 || region.page_size == 0 || region.size % region.page_size != 0) {
    throw TransferError(errc::invalid_region, name + ": size " + text(region.size) + " bytes, page size " +
                                                  text(region.page_size) + " bytes" +
                                                  (region.data == nullptr ? ", null data" : "") +
                                                  "; the size must be a positive multiple of the page size");
  }
  if (!allows(Access::read_write, region.peer_access)) {
    throw TransferError(errc::invalid_region, name + ": access " + text(static_cast<std::uint64_t>(region.peer_access)) +
                                                  ", at most " + text(static_cast<std::uint64_t>(Access::read_write)));
  }
  if (region.size > std::numeric_limits<std::uintptr_t>::max() - reinterpret_cast<std::uintptr_t>(region.data)) {
    throw TransferError(errc::invalid_region,
                        name + ": size " + text(region.size) + " bytes reach beyond the last address there is");
  }
}

KVFERRY_INLINE void refuse_dmabuf(const LocalRegion& region, std::string_view transport) {
  if (region.dmabuf_fd != -1) {
    throw TransferError(errc::not_supported, "region " + text(region.number) + ": " + std::string(transport) +
                                                 " can't reach memory of a dma-buf");
  }
}

KVFERRY_INLINE void refuse_dmabufs(std::span<const MemoryRegion> regions, std::string_view transport) {
  for (std::size_t i = 0; i < regions.size(); ++i) {
    refuse_dmabuf({regions[i], static_cast<std::uint32_t>(i)}, transport);
  }
}

KVFERRY_INLINE Failure check_id(std::string_view id, std::string_view whose) {
  const std::string begins = std::string(whose) + " id ";
  if (id.empty()) {
    return {errc::empty_peer_id, begins + "is empty"};
  }
  if (const std::string why = why_no_id(id); !why.empty()) {
    return {errc::invalid_peer_id, begins + in_quotes(id) + " " + why};
  }
  return {};
}

KVFERRY_INLINE Failure check_request(const TransferRequest& request, const Capabilities& capabilities) {
  const std::size_t count = request.objects.size();
  const auto mismatch = [&](std::string_view what, std::size_t other) {
    return Failure{errc::count_mismatch, text(count) + " objects, " + text(other) + " " + std::string(what)};
  };
  if (request.peer_id.empty()) {
    return {errc::empty_peer_id, "the peer id is empty"};
  }
  if (!supported(request.kind, capabilities)) {
    return {errc::not_supported, "the transport has no " + std::string(to_string(request.kind))};
  }
  if (request.checksums.value_or(false) && !capabilities.checksums) {
    return {errc::not_supported, "the transport has no checksums"};
  }
  if (!request.remote_ranges.empty() || !request.local_strides.empty()) {
    if (Failure failure = check_ranges(request, capabilities)) {
      return failure;
    }
  }
  if (request.remote_ranges.empty() &&
      (request.one_sided() ? request.remote_indexes.size() != count : !request.remote_indexes.empty())) {
    return mismatch("remote indexes", request.remote_indexes.size());
  }
  if (!request.statuses.empty() && request.statuses.size() != count) {
    return mismatch("statuses", request.statuses.size());
  }
  if (!request.sizes.empty() && request.sizes.size() != count) {
    return mismatch("sizes", request.sizes.size());
  }
  if (request.notification.empty() && request.notification_key != 0) {
    return {std::make_error_code(std::errc::invalid_argument),
            "notification key " + text(request.notification_key) + " without a notification"};
  }
  if (!request.notification.empty()) {
    if (!request.one_sided() || !capabilities.notifications) {
      return {errc::not_supported, capabilities.notifications ? "a notification goes with a write or read, or alone"
                                                              : "the transport has no notifications"};
    }
    if (request.notification.size() > capabilities.max_notification_bytes) {
      return {errc::notification_too_large, "notification of " + text(request.notification.size()) +
                                                " bytes, at most " + text(capabilities.max_notification_bytes)};
    }
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (request.objects[i].data() == nullptr && !request.objects[i].empty()) {
      return {std::make_error_code(std::errc::bad_address),
              "object " + text(i) + " of " + text(request.objects[i].size()) + " bytes is at address null"};
    }
  }
  return {};
}

KVFERRY_INLINE Failure check_against_peer(const TransferRequest& request, const PeerDescription& peer,
                                          std::span<const MemoryRegion> paged) {
  if (!request.one_sided() || request.objects.empty()) {
    return {};
  }
  if (!request.remote_ranges.empty()) {
    return check_ranges_against_peer(request, peer);
  }
  const RemoteRegion* found = nullptr;
  if (Failure failure = check_region(request.kind, request.remote_region, peer, found)) {
    return failure;
  }
  const RemoteRegion& region = *found;
  // Later ones have their numbers of the order in which either side has added them, which means nothing.
  const std::uint32_t number = request.remote_region;
  const bool paired = number < paged.size() && number < peer.given_regions;
  if (paired && paged[number].page_size != region.page_size) {
    return {errc::page_size_mismatch, "remote region " + text(number) + " has pages of " + text(region.page_size) +
                                          " bytes, this channel's region of that number of " +
                                          text(paged[number].page_size) + "; byte ranges have no such condition"};
  }
  const std::uint64_t pages = region.page_count();
  const LocalBytes local(request);
  for (std::size_t i = 0; i < request.objects.size(); ++i) {
    if (request.remote_indexes[i] >= pages) {
      return {errc::index_out_of_range, "object " + text(i) + ": remote index " + text(request.remote_indexes[i]) +
                                            ", remote region " + text(request.remote_region) + " has " + text(pages) +
                                            " pages"};
    }
    if (const std::size_t bytes = local.size(i); bytes > region.page_size) {
      return {errc::object_too_large, "object " + text(i) + ": " + text(bytes) + " bytes, pages of remote region " +
                                          text(request.remote_region) + " have " + text(region.page_size)};
    }
  }
  return {};
}

KVFERRY_INLINE Failure check_handshake(const LocalFacts& local, const std::string& peer, std::uint64_t version,
                                       const std::string& transport, std::uint64_t incarnation,
                                       const std::vector<RegionTuple>& regions) {
  const std::string who = "peer " + in_quotes(peer) + ": ";
  if (version != protocol_version) {
    return {errc::version_mismatch,
            who + "protocol version " + text(version) + ", this channel speaks " + text(protocol_version)};
  }
  if (transport != local.transport) {
    return {errc::transport_mismatch,
            who + "transport " + in_quotes(transport) + ", this channel's is '" + std::string(local.transport) + "'"};
  }
  if (incarnation == local.incarnation) {
    return {errc::self_connection, who + "incarnation " + text(incarnation) + " is this channel's own"};
  }
  if (regions.size() > max_regions) {
    return {errc::invalid_region, who + text(regions.size()) + " regions, at most " + text(max_regions)};
  }
  for (std::size_t i = 0; i < regions.size(); ++i) {
    const auto [size, page_size, access] = regions[i];
    if (page_size == 0 || size == 0 || size % page_size != 0) {
      return {errc::invalid_region, who + "region " + text(i) + " has size " + text(size) + " and page size " +
                                        text(page_size) + ", which must divide it"};
    }
    if (access > static_cast<std::uint64_t>(Access::read_write)) {
      return {errc::invalid_region, who + "region " + text(i) + " has access " + text(access) + ", at most 3"};
    }
  }
  return {};
}

KVFERRY_INLINE Failure check_region_numbers(const std::string& peer, std::size_t regions,
                                            const std::optional<std::vector<std::uint64_t>>& numbers,
                                            const std::optional<std::uint64_t>& next,
                                            const std::optional<std::uint64_t>& given) {
  const std::string who = "peer " + in_quotes(peer) + ": ";
  if (numbers && numbers->size() != regions) {
    return {errc::invalid_region, who + text(numbers->size()) + " numbers for " + text(regions) + " regions"};
  }
  if (numbers) {
    const auto wrong = std::ranges::adjacent_find(*numbers, std::greater_equal<>());
    if (wrong != numbers->end()) {
      return {errc::invalid_region, who + "region " + text(*(wrong + 1)) + " after region " + text(*wrong)};
    }
  }
  const std::uint64_t least = numbers && !numbers->empty() ? numbers->back() + 1 : numbers ? 0 : regions;
  const std::uint64_t end = std::uint64_t{RegionTable::max_number} + 1;
  const std::uint64_t follows = next.value_or(least);
  if (follows < least || follows > end || (numbers && !numbers->empty() && least == 0)) {
    return {errc::invalid_region, who + "its next region is number " + text(follows) + ", at least " + text(least) +
                                      " and at most " + text(end)};
  }
  if (given.value_or(0) > follows) {
    return {errc::invalid_region,
            who + "it was made with " + text(*given) + " regions, and the next one is number " + text(follows)};
  }
  return {};
}

KVFERRY_INLINE std::vector<RegionTuple> describe_regions(std::span<const LocalRegion> regions) {
  std::vector<RegionTuple> tuples;
  tuples.reserve(regions.size());
  for (const MemoryRegion& region : regions) {
    tuples.emplace_back(region.size, region.page_size, static_cast<std::uint64_t>(region.peer_access));
  }
  return tuples;
}

KVFERRY_INLINE std::vector<RemoteRegion> read_regions(const std::vector<RegionTuple>& regions) {
  std::vector<RemoteRegion> remote;
  remote.reserve(regions.size());
  for (const auto& [size, page_size, access] : regions) {
    remote.push_back({size, page_size, static_cast<Access>(access), static_cast<std::uint32_t>(remote.size())});
  }
  return remote;
}

KVFERRY_INLINE Failure refusal_of(const Operation& operation) {
  if (const auto cause = operation.stop_cause()) {
    return {cause, {}};
  }
  const TransferRequest& request = operation.request();
  if (!request.one_sided() && request.objects.size() > max_paired_objects) {
    return {std::make_error_code(std::errc::argument_list_too_long),
            std::to_string(request.objects.size()) + " objects, at most " + std::to_string(max_paired_objects) +
                " go in one " + std::string(to_string(request.kind))};
  }
  return {};
}

}  // namespace kvferry::kit
