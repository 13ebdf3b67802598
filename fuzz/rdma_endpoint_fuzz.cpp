// SPDX-License-Identifier: Apache-2.0
// Endpoints of RDMA peers. An endpoint that is taken for sensible can be used: each page has a key, two rails agree upon
// values that both have - and so can whatever a device says of its limits.
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <kvferry/kit/endpoint_codec.hpp>
#include "fuzz/input.hpp"
#include "rdma/device_limits.hpp"
#include "rdma/endpoint.hpp"
#include "rdma/message.hpp"
#include "rdma/work_planner.hpp"

namespace {

using kvferry::Access;
using kvferry::RemoteRegion;
using kvferry::fuzz::Input;
using kvferry::fuzz::require;
using namespace kvferry::rdma;

/// As adapters give them: not as small as a count. A message may have at most one value for every two bytes.
constexpr std::uint32_t adapters_key = 0x00012f00;

std::uint64_t near(Input& input, std::uint64_t sensible) {
  return input.choice(8) == 7 ? input.any_number() : sensible;
}

RailEndpoint make_rail(Input& input, std::uint64_t number, const std::vector<RemoteRegion>& regions) {
  RailEndpoint rail;
  rail.rail = near(input, number);
  rail.link_layer = input.choice(8) == 7 ? "InfiniBand" : "Ethernet";
  rail.gid_type = input.choice(8) == 7 ? "RoCE v1" : "RoCE v2";
  rail.gid = input.bytes(input.choice(16) == 15 ? input.number() : 16);
  if (input.flag()) {
    rail.gid.resize(16);
  }
  rail.lid = near(input, 1);
  rail.queue_pair = near(input, 17);
  rail.packet_number = near(input, 4711);
  rail.mtu = near(input, std::uint64_t{256} << input.choice(5));
  rail.reads_taken = near(input, input.number());
  rail.reads_made = near(input, input.number());
  rail.max_message = near(input, std::uint64_t{1} << 30);
  for (const RemoteRegion& region : regions) {
    RegionKeys keys;
    keys.number = near(input, region.number);
    if (near(input, 0) != 0) {
      rail.regions.push_back(keys);
      continue;
    }
    if (region.access != Access::none) {
      keys.address = near(input, 4096);
      keys.slice_bytes = near(input, 1 + region.size / (1 + input.choice(8)));
      const std::uint64_t slices = keys.slice_bytes == 0 ? 0 : (region.size - 1) / keys.slice_bytes + 1;
      keys.keys.resize(static_cast<std::size_t>(std::min<std::uint64_t>(near(input, slices), 2000)), adapters_key);
    }
    rail.regions.push_back(std::move(keys));
  }
  return rail;
}

Endpoint make_endpoint(Input& input, const std::vector<RemoteRegion>& regions) {
  Endpoint endpoint;
  endpoint.message_bytes = near(input, message_bytes);
  endpoint.messages = near(input, messages);
  if (input.flag()) {
    endpoint.first_messages = near(input, first_messages);
  }
  const std::size_t rails = input.choice(18);
  for (std::size_t i = 0; i < rails; ++i) {
    endpoint.rails.push_back(make_rail(input, i, regions));
  }
  return endpoint;
}

/// Of each page's bytes the address and the key can be told, whatever the endpoint is like that was accepted.
void use(const RegionKeys& keys, const RemoteRegion& region) {
  if (region.access == Access::none) {
    require(keys.keys.empty(), "nobody has a key of a closed region");
    return;
  }
  const std::uint64_t pages = region.size / region.page_size;
  std::vector<std::uint64_t> indexes{0, pages / 2, pages - 1};
  const RemoteMemory remote(keys, region.page_size, indexes);
  for (std::size_t object = 0; object < indexes.size(); ++object) {
    std::uint64_t offset = 0;
    while (offset < region.page_size) {
      const auto place = remote.place(object, static_cast<std::size_t>(offset));
      require(place.available != 0 && place.address >= keys.address && place.address - keys.address < region.size,
              "a page lies within its region");
      if (place.available >= region.page_size - offset) {
        break;
      }
      offset += place.available;
      if (keys.slice_bytes < region.page_size / 16) {
        offset = region.page_size - 1;  // the last one, and enough
        require(remote.place(object, static_cast<std::size_t>(offset)).available != 0, "its last byte has a key");
        break;
      }
    }
  }
}

void check_endpoints(Input& input) {
  std::vector<RemoteRegion> regions;
  const std::size_t count = input.choice(4);
  for (std::size_t i = 0; i < count; ++i) {
    // As the handshake lets them pass: whole pages.
    const std::uint64_t page_size = std::uint64_t{1} << input.choice(21);
    regions.push_back({page_size * (1 + input.choice(64)), page_size, static_cast<Access>(input.choice(4)),
                       static_cast<std::uint32_t>(i)});
  }
  Input own_input = input;
  const RailEndpoint own = make_rail(own_input, 0, regions);
  Endpoint endpoint;
  std::error_code ec;
  if (input.flag()) {
    const auto bytes = input.bytes(input.rest().size());
    endpoint = kvferry::kit::decode_endpoint<Endpoint>(kvferry::Bytes(bytes.begin(), bytes.end()), ec);
  } else {
    const auto made = kvferry::kit::encode_endpoint(make_endpoint(input, regions));
    if (made.size() > 65'536) {
      return;
    }
    endpoint = kvferry::kit::decode_endpoint<Endpoint>(made, ec);
    require(!ec, "what is encoded can be decoded");
    require(kvferry::kit::encode_endpoint(endpoint) == made, "and is the same");
  }
  if (ec || !check_endpoint(endpoint, regions).empty()) {
    return;
  }
  require(endpoint.messages >= min_messages && endpoint.messages <= max_messages &&
              endpoint.message_bytes >= min_message_bytes && endpoint.message_bytes <= max_message_bytes &&
              !endpoint.rails.empty() && endpoint.rails.size() <= max_rails,
          "what is agreed upon is bounded");
  require(!endpoint.first_messages ||
              (*endpoint.first_messages >= min_first_messages && *endpoint.first_messages <= endpoint.messages),
          "and so is what of it is there at first");
  for (const RailEndpoint& rail : endpoint.rails) {
    for (const RemoteRegion& region : regions) {
      const auto keys = std::ranges::find(rail.regions, std::uint64_t{region.number}, &RegionKeys::number);
      if (keys != rail.regions.end()) {
        use(*keys, region);
      }
    }
    Endpoint of_own{message_bytes, messages, {own}};
    if (!check_endpoint(of_own, regions).empty() || !check_pairing(own, rail).empty()) {
      continue;
    }
    require(check_pairing(rail, own).empty(), "if one side can be joined, so can the other");
    const Agreement agreed = agree(own, rail);
    const Agreement other = agree(rail, own);
    require(agreed.mtu == other.mtu && agreed.reads_taken == other.reads_made &&
                agreed.reads_made == other.reads_taken && agreed.max_message == other.max_message,
            "both sides agree upon the same");
    require(agreed.mtu >= 256 && agreed.mtu <= 4096 && agreed.reads_taken != 0 && agreed.reads_made != 0 &&
                agreed.reads_taken <= 255 && agreed.reads_made <= 255 && agreed.max_message >= max_message_bytes,
            "what is agreed upon can be set");
  }
}

void check_limits(Input& input) {
  ibv_device_attr limits{};
  limits.max_qp_wr = input.number<std::int32_t>();
  limits.max_cqe = input.number<std::int32_t>();
  limits.max_sge = input.number<std::int32_t>();
  limits.max_sge_rd = input.number<std::int32_t>();
  const QueuePairSize wanted{16U + input.number<std::uint16_t>(), 1U + input.number(), input.number()};
  const auto sizes = sizes_to_try(limits, wanted, input.number<std::uint16_t>());
  require(!sizes.empty() && sizes.size() < 256, "there is something to try, and an end to it");
  for (const QueuePairSize& size : sizes) {
    require(size.requests >= 16 && size.requests <= wanted.requests && size.pieces >= 1 &&
                size.pieces <= wanted.pieces && size.inline_bytes <= wanted.inline_bytes,
            "sizes are between the least and what was wanted");
    const auto common = common_pieces(limits, size.pieces);
    require(common >= 1 && common <= size.pieces, "a request has a piece");
  }
  std::vector<std::uint16_t> table(input.choice(8));
  for (auto& entry : table) {
    entry = input.number<std::uint16_t>();
  }
  const auto wanted_partition = input.number<std::uint16_t>();
  const auto found = find_partition(table, wanted_partition);
  require(!found || (*found < table.size() && ((table[*found] ^ wanted_partition) & 0x7fff) == 0),
          "the partition is the one that was wanted");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  if (input.choice(4) == 0) {
    check_limits(input);
  } else {
    check_endpoints(input);
  }
  return 0;
}
