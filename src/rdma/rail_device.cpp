// SPDX-License-Identifier: Apache-2.0
#include "rail_device.hpp"

#include <arpa/inet.h>

#include <asio/ip/address.hpp>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <utility>

#include <kvferry/error.hpp>

#include "device_limits.hpp"
#include "message.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

/// A GID table that claims to be larger is read so far.
constexpr std::size_t max_gids = 1024;

using DeviceList = std::unique_ptr<ibv_device*, decltype(&ibv_free_device_list)>;

DeviceList list_devices(std::size_t& count) {
  // Registered memory must not be moved away from the adapter when the process forks and then writes to it. Older kernels
  // have to be told, before anything is registered. Newer ones need not, and must not: the pages that registered memory lies in
  // would be missing in every child, which dies of it where malloc's own data are beside them (ibv_fork_init(3)).
  [[maybe_unused]] static const int fork_is_safe = ibv_is_fork_initialized() == IBV_FORK_UNNEEDED ? 0 : ibv_fork_init();
  int number = 0;
  DeviceList devices(ibv_get_device_list(&number), &ibv_free_device_list);
  count = devices == nullptr ? 0 : static_cast<std::size_t>(number);
  return devices;
}

ContextPtr open_device(const std::string& name) {
  std::size_t count = 0;
  const DeviceList devices = list_devices(count);
  std::string known;
  for (ibv_device* const device : std::span(devices.get(), count)) {
    if (name == ibv_get_device_name(device)) {
      if (const auto why = unusable_because(*device); !why.empty()) {
        throw TransferError(std::make_error_code(std::errc::operation_not_supported),
                            "RDMA device '" + name + "' can't be a rail: " + why);
      }
      ContextPtr context(ibv_open_device(device));
      if (context == nullptr) {
        throw TransferError(last_verbs_error(), "RDMA device '" + name + "' can't be opened");
      }
      return context;
    }
    known += std::string(known.empty() ? "" : ", ") + ibv_get_device_name(device);
  }
  // A host without any lacks RDMA; on another one the name is wrong.
  throw TransferError(std::make_error_code(known.empty() ? std::errc::no_such_device : std::errc::invalid_argument),
                      "no RDMA device '" + name + "', there " + (known.empty() ? "is none" : "are: " + known));
}

std::vector<ibv_gid_entry> gids_of(ibv_context* context, std::uint8_t port) {
  std::vector<ibv_gid_entry> entries(max_gids);
  const ssize_t count = ibv_query_gid_table(context, entries.data(), entries.size(), 0);
  entries.resize(count < 0 ? 0 : static_cast<std::size_t>(count));
  // An address vector has a byte for the index.
  std::erase_if(entries, [&](const ibv_gid_entry& entry) { return entry.port_num != port || entry.gid_index > 255; });
  return entries;
}

asio::ip::address_v6 as_address(const ibv_gid& gid) {
  asio::ip::address_v6::bytes_type bytes;
  std::memcpy(bytes.data(), gid.raw, bytes.size());
  return asio::ip::address_v6(bytes);
}

/// The host as a GID holds it; nothing if it is a name or stands for all addresses.
std::optional<asio::ip::address_v6> as_gid_address(const std::string& host) {
  std::error_code ec;
  const auto address = asio::ip::make_address(host, ec);
  if (ec || address.is_unspecified()) {
    return std::nullopt;
  }
  return address.is_v4() ? asio::ip::make_address_v6(asio::ip::v4_mapped, address.to_v4())
                         : asio::ip::address_v6(address.to_v6().to_bytes());
}

/// The less, the better.
int rank(const ibv_gid_entry& entry, const std::optional<asio::ip::address_v6>& preferred) {
  const auto address = as_address(entry.gid);
  const int type = entry.gid_type == IBV_GID_TYPE_ROCE_V1 ? 10 : 0;
  if (preferred && address == *preferred) {
    return type;
  }
  return type + (address.is_v4_mapped() ? 1 : address.is_link_local() ? 3 : 2);
}

std::string as_hex(std::uint16_t key) {
  std::array<char, 8> text{};
  (void)std::snprintf(text.data(), text.size(), "0x%04x", key);
  return text.data();
}

bool is_active(ibv_context* context, std::uint8_t port) {
  ibv_port_attr attributes{};
  return ibv_query_port(context, port, &attributes) == 0 && attributes.state == IBV_PORT_ACTIVE;
}

/// Calls `function(context, device name, port)` for each active port of a usable device until it returns true.
/// @return the devices that aren't usable, and why.
template <class Function>
std::string find_active_port(Function function) {
  std::string unusable;
  std::size_t count = 0;
  const DeviceList devices = list_devices(count);
  for (ibv_device* const device : std::span(devices.get(), count)) {
    if (const auto why = unusable_because(*device); !why.empty()) {
      unusable += std::string("; not '") + ibv_get_device_name(device) + "': " + why;
      continue;
    }
    const ContextPtr context(ibv_open_device(device));
    ibv_device_attr attributes{};
    if (context == nullptr || ibv_query_device(context.get(), &attributes) != 0) {
      continue;
    }
    for (unsigned port = 1; port <= attributes.phys_port_cnt; ++port) {
      const auto number = static_cast<std::uint8_t>(port);
      if (is_active(context.get(), number) && function(context.get(), ibv_get_device_name(device), number)) {
        return unusable;
      }
    }
  }
  return unusable;
}

}  // namespace

RdmaRail default_rail(const std::string& host) {
  const auto wanted = as_gid_address(host);
  std::optional<RdmaRail> first;
  std::optional<RdmaRail> found;
  const auto unusable = find_active_port([&](ibv_context* context, const char* name, std::uint8_t port) {
    if (!first) {
      first = RdmaRail{name, port};
    }
    const auto entries = gids_of(context, port);
    if (wanted && std::ranges::any_of(entries, [&](const auto& entry) { return as_address(entry.gid) == *wanted; })) {
      found = RdmaRail{name, port};
    }
    return found.has_value();
  });
  if (!first) {
    throw TransferError(std::make_error_code(std::errc::no_such_device),
                        "no InfiniBand or RoCE device with an active port" + unusable);
  }
  return found ? *found : *first;
}

std::vector<RdmaRail> active_rails() {
  std::vector<RdmaRail> rails;
  (void)find_active_port([&](ibv_context*, const char* name, std::uint8_t port) {
    rails.push_back({name, port});
    return false;
  });
  return rails;
}

RailDevice::RailDevice(RdmaRail rail, std::string preferred_host)
    : rail_(std::move(rail)), preferred_host_(std::move(preferred_host)), context_(open_device(rail_.device)) {
  if (const int result = ibv_query_device(context_.get(), &limits_); result != 0) {
    throw TransferError(verbs_error(result), "RDMA device '" + rail_.device + "' says nothing of itself");
  }
  if (rail_.port == 0 || rail_.port > limits_.phys_port_cnt) {
    throw TransferError(std::make_error_code(std::errc::invalid_argument),
                        "RDMA device '" + rail_.device + "' has no port " + std::to_string(rail_.port) + " but " +
                            std::to_string(limits_.phys_port_cnt));
  }
  (void)partition_index();
}

PortAddress RailDevice::address() const {
  ibv_port_attr attributes{};
  if (const int result = ibv_query_port(context_.get(), rail_.port, &attributes); result != 0) {
    throw TransferError(verbs_error(result), "RDMA device '" + rail_.device + "': its port can't be queried");
  }
  PortAddress address;
  address.active = attributes.state == IBV_PORT_ACTIVE;
  address.ethernet = attributes.link_layer == IBV_LINK_LAYER_ETHERNET;
  address.needs_global_route = (attributes.flags & IBV_QPF_GRH_REQUIRED) != 0;
  address.lid = attributes.lid;
  address.mtu = attributes.active_mtu;
  address.max_message = attributes.max_msg_sz;

  const auto entries = gids_of(context_.get(), rail_.port);
  auto chosen = entries.end();
  if (rail_.gid_index) {
    chosen = std::ranges::find(entries, *rail_.gid_index, &ibv_gid_entry::gid_index);
  } else {
    const auto preferred = as_gid_address(preferred_host_);
    chosen = std::ranges::min_element(entries, {}, [&](const auto& entry) { return rank(entry, preferred); });
  }
  if (chosen == entries.end()) {
    if (address.active) {
      throw TransferError(std::make_error_code(std::errc::address_not_available),
                          "RDMA device '" + rail_.device + "' has no GID" +
                              (rail_.gid_index ? " of index " + std::to_string(*rail_.gid_index) : std::string()));
    }
    return address;
  }
  address.gid_index = chosen->gid_index;
  address.gid = chosen->gid;
  address.gid_type = static_cast<ibv_gid_type>(chosen->gid_type);
  return address;
}

std::uint16_t RailDevice::partition_index() const {
  if (!rail_.partition_key) {
    return 0;
  }
  ibv_port_attr attributes{};
  if (const int result = ibv_query_port(context_.get(), rail_.port, &attributes); result != 0) {
    throw TransferError(verbs_error(result), "RDMA device '" + rail_.device + "': its port can't be queried");
  }
  std::vector<std::uint16_t> table;
  std::string known;
  for (int i = 0; i < attributes.pkey_tbl_len; ++i) {
    std::uint16_t key = 0;
    if (ibv_query_pkey(context_.get(), rail_.port, i, &key) != 0) {
      break;
    }
    table.push_back(ntohs(key));
    if (table.back() != 0) {
      known += (known.empty() ? "" : ", ") + as_hex(table.back());
    }
  }
  const auto index = find_partition(table, *rail_.partition_key);
  if (!index) {
    throw TransferError(std::make_error_code(std::errc::invalid_argument),
                        "RDMA device '" + rail_.device + "', port " + std::to_string(rail_.port) +
                            ": no partition of key " + as_hex(*rail_.partition_key) + ", there are: " + known);
  }
  return *index;
}

}  // namespace kvferry::rdma
