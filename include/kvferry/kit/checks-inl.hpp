// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/checks.hpp>

#include <algorithm>
#include <limits>

#include <kvferry/error.hpp>

#include <kvferry/detail/text.hpp>
#include <kvferry/kit/tag_matcher.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// A peer has a handful of regions; a handshake that claims more is not one.
inline constexpr std::size_t max_regions = 1024;

KVFERRY_INLINE std::string text(std::uint64_t number) { return std::to_string(number); }

KVFERRY_INLINE Access needed_access(TransferKind kind) { return kind == TransferKind::write ? Access::write : Access::read; }

KVFERRY_INLINE bool supported(TransferKind kind, const Capabilities& capabilities) {
  switch (kind) {
    case TransferKind::send:
    case TransferKind::recv: return capabilities.send_recv;
    case TransferKind::write: return capabilities.write;
    case TransferKind::read: return capabilities.read;
  }
  return false;
}

}  // namespace internal

KVFERRY_INLINE void check_regions(std::span<const MemoryRegion> regions) {
  if (regions.size() > max_regions) {
    throw TransferError(errc::invalid_region, text(regions.size()) + " regions, at most " + text(max_regions));
  }
  for (std::size_t i = 0; i < regions.size(); ++i) {
    const MemoryRegion& region = regions[i];
    if (region.data == nullptr || region.size == 0 || region.page_size == 0 || region.size % region.page_size != 0) {
      throw TransferError(errc::invalid_region,
                          "region " + text(i) + ": size " + text(region.size) + " bytes, page size " +
                              text(region.page_size) + " bytes" + (region.data == nullptr ? ", null data" : "") +
                              "; the size must be a positive multiple of the page size");
    }
  }
}

KVFERRY_INLINE Failure check_id(std::string_view id, std::string_view whose) {
  const std::string begins = std::string(whose) + " id ";
  if (id.empty()) {
    return {errc::empty_peer_id, begins + "is empty"};
  }
  if (id.size() > max_peer_id_bytes) {
    return {errc::invalid_peer_id,
            begins + in_quotes(id) + " has " + text(id.size()) + " bytes, at most " + text(max_peer_id_bytes)};
  }
  if (!is_utf8(id)) {
    return {errc::invalid_peer_id, begins + in_quotes(id) + " is not UTF-8"};
  }
  if (has_control_character(id)) {
    return {errc::invalid_peer_id, begins + in_quotes(id) + " has a control character"};
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
  if (request.one_sided() ? request.remote_indexes.size() != count : !request.remote_indexes.empty()) {
    return mismatch("remote indexes", request.remote_indexes.size());
  }
  if (!request.statuses.empty() && request.statuses.size() != count) {
    return mismatch("statuses", request.statuses.size());
  }
  if (!request.sizes.empty() && request.sizes.size() != count) {
    return mismatch("sizes", request.sizes.size());
  }
  if (!request.notification.empty()) {
    if (request.kind != TransferKind::write || !capabilities.notifications) {
      return {errc::not_supported, "a notification goes with a write only"};
    }
    if (request.notification.size() > capabilities.max_notification_bytes) {
      return {errc::notification_too_large, "notification of " + text(request.notification.size()) +
                                                " bytes, at most " + text(capabilities.max_notification_bytes)};
    }
    if (count == 0) {
      return {errc::count_mismatch, "a notification needs at least one object to follow"};
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

KVFERRY_INLINE Failure check_against_peer(const TransferRequest& request, const PeerDescription& peer) {
  if (!request.one_sided()) {
    return {};
  }
  if (request.remote_region >= peer.regions.size()) {
    return {errc::unknown_region,
            "remote region " + text(request.remote_region) + ", the peer has " + text(peer.regions.size())};
  }
  const RemoteRegion& region = peer.regions[request.remote_region];
  if (!allows(region.access, needed_access(request.kind))) {
    return {errc::access_denied, "remote region " + text(request.remote_region) + " does not allow peers to " +
                                     std::string(to_string(request.kind))};
  }
  const std::uint64_t pages = region.page_count();
  for (std::size_t i = 0; i < request.objects.size(); ++i) {
    if (request.remote_indexes[i] >= pages) {
      return {errc::index_out_of_range, "object " + text(i) + ": remote index " + text(request.remote_indexes[i]) +
                                            ", remote region " + text(request.remote_region) + " has " + text(pages) +
                                            " pages"};
    }
    if (request.objects[i].size() > region.page_size) {
      return {errc::object_too_large, "object " + text(i) + ": " + text(request.objects[i].size()) +
                                          " bytes, pages of remote region " + text(request.remote_region) + " have " +
                                          text(region.page_size)};
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
    if (local.require_equal_page_sizes && i < local.regions.size() && local.regions[i].page_size != page_size) {
      return {errc::page_size_mismatch, who + "region " + text(i) + " has page size " + text(page_size) +
                                            ", this channel's has " + text(local.regions[i].page_size)};
    }
  }
  return {};
}

KVFERRY_INLINE std::vector<RegionTuple> describe_regions(std::span<const MemoryRegion> regions) {
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
    remote.push_back({size, page_size, static_cast<Access>(access)});
  }
  return remote;
}

KVFERRY_INLINE Failure refusal_of(const Operation& operation) {
  if (const auto cause = operation.stop_cause()) {
    return {cause, {}};
  }
  const TransferRequest& request = operation.request();
  if (!request.one_sided() && request.objects.size() > max_paired_objects) {
    return {errc::resource_limit, std::to_string(request.objects.size()) + " objects, at most " +
                                      std::to_string(max_paired_objects) + " go in one " +
                                      std::string(to_string(request.kind))};
  }
  return {};
}

}  // namespace kvferry::kit
