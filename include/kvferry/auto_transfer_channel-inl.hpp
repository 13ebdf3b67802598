// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/auto_transfer_channel.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <optional>
#include <thread>
#include <utility>

#include <kvferry/auto/own_roads.hpp>
#include <kvferry/auto/road_acceptance.hpp>
#include <kvferry/auto/road_dial.hpp>
#include <kvferry/auto/road_offers.hpp>
#include <kvferry/detail/text.hpp>
#include <kvferry/error.hpp>
#include <kvferry/kit/endpoint_codec.hpp>
#include <kvferry/kit/road.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/tcp_transfer_channel.hpp>

namespace kvferry::inline KVFERRY_ABI {
namespace roads {
inline namespace internal {

inline constexpr std::size_t max_roads = 16;
inline constexpr std::size_t max_name_bytes = 32;

KVFERRY_INLINE void check_names(const std::vector<AutoRoad>& given, const std::vector<std::string>& required) {
  const auto invalid = [](const std::string& why) {
    throw TransferError(std::make_error_code(std::errc::invalid_argument), why);
  };
  if (given.size() > max_roads) {
    invalid(std::to_string(given.size()) + " roads, at most " + std::to_string(max_roads));
  }
  for (std::size_t i = 0; i < given.size(); ++i) {
    const std::string& name = given[i].name;
    if (name.empty() || name.size() > max_name_bytes || !is_utf8(name) || has_control_character(name)) {
      invalid("road " + std::to_string(i) + " has the name " + in_quotes(name) + ", not one of 1 to " +
              std::to_string(max_name_bytes) + " bytes of UTF-8 without control characters");
    }
    if (std::ranges::count(given, name, &AutoRoad::name) > 1) {
      invalid("there are two roads of the name " + in_quotes(name));
    }
  }
  for (const std::string& name : required) {
    if (std::ranges::find(given, name, &AutoRoad::name) == given.end()) {
      invalid("the road " + in_quotes(name) + " is required, and is none of those given");
    }
  }
}

/// Whether it says that the host doesn't have the transport, rather than that the options are wrong.
KVFERRY_INLINE bool is_missing(const std::error_code& cause, const ChannelOptions& options) {
  constexpr std::array missing{std::errc::no_such_device, std::errc::operation_not_supported,
                               std::errc::function_not_supported, std::errc::network_down,
                               std::errc::not_enough_memory};
  // Some transports can't reach memory of a dma-buf, which is for the others then.
  const bool unreachable =
      cause == errc::not_supported &&
      std::ranges::any_of(options.regions, [](const MemoryRegion& region) { return region.dmabuf_fd != -1; });
  return unreachable ||
         std::ranges::any_of(missing, [&](std::errc one) { return cause == std::make_error_condition(one); });
}

/// The capabilities that both have.
KVFERRY_INLINE Capabilities common(const Capabilities& one, const Capabilities& other) {
  return {.send_recv = one.send_recv && other.send_recv,
          .write = one.write && other.write,
          .read = one.read && other.read,
          .notifications = one.notifications && other.notifications,
          .ranges = one.ranges && other.ranges,
          .unregistered_objects = one.unregistered_objects && other.unregistered_objects,
          .checksums = one.checksums && other.checksums,
          .region_changes = one.region_changes && other.region_changes,
          .max_notification_bytes = std::min(one.max_notification_bytes, other.max_notification_bytes)};
}

[[noreturn]] KVFERRY_INLINE void refuse_road(const std::string& name, const std::string& why) {
  throw TransferError(std::make_error_code(std::errc::invalid_argument), "the road " + in_quotes(name) + " " + why);
}

KVFERRY_INLINE bool same_memory(const std::vector<MemoryRegion>& one, const std::vector<MemoryRegion>& other) {
  return std::ranges::equal(one, other, [](const MemoryRegion& left, const MemoryRegion& right) {
    return left.data == right.data && left.size == right.size && left.page_size == right.page_size &&
           left.peer_access == right.peer_access && (left.dmabuf_fd == -1) == (right.dmabuf_fd == -1) &&
           left.dmabuf_offset == right.dmabuf_offset;  // a descriptor has as many numbers as it has duplicates
  });
}

}  // namespace internal
}  // namespace roads

/// Options that are compared as they are.
#define KVFERRY_COMPARED_OPTIONS(X) \
  X(peer_init_url) X(advertised_init_url) X(peer_lookup_url) X(hold_side_messages) X(require_equal_page_sizes) \
  X(checksums) X(max_peers) X(default_timeout) X(handshake_timeout) X(max_pending_operations) \
  X(max_pending_peer_events) X(max_pending_notifications) X(max_pending_notifications_of_peer) X(executor) \
  X(io_threads) X(log_level) X(max_handshake_bytes) X(max_pending_notification_bytes) \
  X(max_pending_notification_bytes_of_peer) X(max_posted_recv_bytes) X(max_posted_recv_bytes_of_peer) \
  X(max_pending_side_message_bytes) X(max_pending_side_message_bytes_of_source) X(keyring) X(require_encryption) \
  X(zmq_context)

KVFERRY_INLINE void check_options_of_road(const std::string& name, const ChannelOptions& own,
                                          const ChannelOptions& common) {
  const auto check = [&](bool lost, const char* field) {
    if (lost) {
      roads::refuse_road(name, std::string("has a ChannelOptions::") + field +
                                   " of its own, which isn't the AutoTransferChannel's: that of the latter is used");
    }
  };
  const ChannelOptions defaults;
  const auto compare = [&](const auto member, const char* field) {
    check(own.*member != defaults.*member && own.*member != common.*member, field);
  };
#define KVFERRY_COMPARE(field) compare(&ChannelOptions::field, #field);
  KVFERRY_COMPARED_OPTIONS(KVFERRY_COMPARE)
#undef KVFERRY_COMPARE
  check(!own.regions.empty() && !roads::same_memory(own.regions, common.regions), "regions");
  check(own.log_sink && !common.log_sink, "log_sink");
  check(own.poll.spin != defaults.poll.spin && own.poll.spin != common.poll.spin, "poll");
  // There have to be as many names here as there are options: a new one doesn't compile until it is compared, too. The first
  // three are compared above, each in a way of its own; and no user sets `road_of`.
#define KVFERRY_NAME(field) , field
  [[maybe_unused]] const auto& [of_regions, of_log_sink, of_poll, of_road KVFERRY_COMPARED_OPTIONS(KVFERRY_NAME)] = own;
#undef KVFERRY_NAME
}
#undef KVFERRY_COMPARED_OPTIONS

class AutoTransferChannel::Impl {
 public:
  /// @param common the options of each road.
  /// @param encrypted whether no road may lead off the host in the clear.
  void open(const std::vector<AutoRoad>& given, const std::vector<std::string>& required, bool encrypted,
            const ChannelOptions& common) {
    roads::Reasons reasons;
    std::optional<Capabilities> all;
    for (const AutoRoad& one : given) {
      if (!required.empty() && std::ranges::find(required, one.name) == required.end()) {
        continue;
      }
      roads::OwnRoad& own = own_roads->roads.emplace_back();
      own.name = one.name;
      own.within_host = one.within_host;
      try {
        auto channel = one.make ? one.make(common) : nullptr;
        if (!channel) {
          roads::refuse_road(one.name, "makes no channel");
        }
        all_roads.push_back(std::make_unique<kit::Road>(std::move(channel)));
        own.road = all_roads.back().get();
        if (!own.road->is_of(common.road_of)) {
          roads::refuse_road(one.name, "makes a channel of other options than AutoRoad::make gets");
        }
        if (encrypted && !one.within_host && own.road->leaves_host_in_the_clear()) {
          roads::refuse_road(one.name, std::string("moves pages off this host unencrypted, and ") +
                                           (common.require_encryption ? "ChannelOptions::require_encryption is set"
                                                                      : "there is a keyring; "
                                                                        "AutoOptions::allow_unencrypted would allow it"));
        }
      } catch (const std::system_error& error) {
        if (!roads::is_missing(error.code(), common)) {
          throw;
        }
        own.why = escaped(error.what(), 300);
        reasons.add(own.name, {error.code(), own.why}, roads::Reasons::Kind::missing);
        own_roads->logger->log(LogLevel::warning, "road_unavailable", {}, error.code(),
                               [&] { return "no road " + own.name + ": " + own.why; });
        continue;
      }
      const Capabilities its = own.road->capabilities();
      all = all ? roads::common(*all, its) : its;
    }
    if (!all) {
      throw TransferError(errc::no_path, "this host has none of the roads that may be taken: " + reasons.sentence());
    }
    capabilities = *all;
  }

  std::vector<std::unique_ptr<kit::Road>> all_roads;
  /// Attempts keep this for as long as they last.
  const std::shared_ptr<roads::OwnRoads> own_roads = std::make_shared<roads::OwnRoads>();
  Capabilities capabilities;
  /// Of each road; null where it has nothing to forget.
  std::vector<std::function<void(std::uint32_t)>> forgetters;
};

KVFERRY_INLINE AutoTransferChannel::AutoTransferChannel(AutoOptions options)
    : TransferChannelKit(options), impl_(std::make_shared<Impl>()) {  // NOLINT(cppcoreguidelines-slicing): its part
  try {
    const std::vector<AutoRoad> given = options.roads.empty() ? default_roads() : std::move(options.roads);
    const std::vector<std::string> required = std::move(options.require);
    roads::check_names(given, required);
    logger()->set_transport(transport());
    impl_->own_roads->logger = logger();
    impl_->own_roads->host = roads::name_of_host();
    impl_->own_roads->patience = std::clamp<std::chrono::milliseconds>(
        options.road_timeout, std::chrono::milliseconds(1), std::chrono::hours(1));
    const bool encrypted = options.require_encryption || (options.keyring && !options.allow_unencrypted);
    ChannelOptions common = std::move(options);
    common.executor = get_executor();
    common.road_of = std::make_shared<const kit::RoadOf>(kit::RoadOf{incarnation(), logger(), refusals(), poller()});
    impl_->open(given, required, encrypted, common);
    start();
  } catch (...) {
    // The roads' listeners keep the I/O threads busy.
    stop_listening();
    close();
    throw;
  }
}

KVFERRY_INLINE AutoTransferChannel::~AutoTransferChannel() {
  if (inherited()) {
    keep_inherited(std::move(impl_));
    return;
  }
  close();
  run_handlers_left();
}

KVFERRY_INLINE std::vector<AutoRoad> AutoTransferChannel::default_roads() {
  return {road<ShmTransferChannel>("shm", ShmOptions(), true), road<TcpTransferChannel>("tcp", TcpOptions())};
}

KVFERRY_INLINE std::string_view AutoTransferChannel::transport() const noexcept { return "auto"; }

KVFERRY_INLINE Capabilities AutoTransferChannel::capabilities() const noexcept { return impl_->capabilities; }

KVFERRY_INLINE ChannelStats AutoTransferChannel::stats() const {
  ChannelStats stats = TransferChannelKit::stats();
  for (const roads::OwnRoad& own : impl_->own_roads->roads) {
    stats.roads.push_back({own.name, own.counters->taken, own.counters->fallbacks});
    if (own.road) {
      for (PathStats& path : own.road->paths()) {
        stats.paths.push_back({own.name + " " + path.name, path.bytes_out, path.bytes_in});
      }
    }
  }
  return stats;
}

KVFERRY_INLINE std::unique_ptr<kit::Dial> AutoTransferChannel::dial(const std::string& peer_id) {
  return std::make_unique<roads::RoadDial>(impl_->own_roads, peer_id);
}

/// A transport that has threads of its own for what may take its time has the whole answer there. One such decides whether
/// there is room: what another said once the call is over, nobody would hear.
KVFERRY_INLINE bool AutoTransferChannel::run_accept(const std::string& source, std::size_t bytes,
                                                    std::function<void()> answer) {
  const auto taken = std::make_shared<bool>(true);
  for (const roads::OwnRoad& own : impl_->own_roads->roads) {
    if (own.road) {
      answer = [road = own.road, source, bytes, taken, caller = std::this_thread::get_id(),
                answer = std::move(answer)] {
        if (std::this_thread::get_id() != caller) {
          answer();
        } else if (!road->run_accept(source, bytes, answer)) {
          *taken = false;
        }
      };
    }
  }
  answer();
  return *taken;
}

KVFERRY_INLINE Bytes AutoTransferChannel::accept(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint,
                                                 kit::Clock::time_point deadline, kit::LinkHandler on_link) {
  std::error_code ec;
  const auto asked = kit::decode_endpoint<roads::RoadOffers>(remote_endpoint, ec);
  if (ec) {
    throw TransferError(ec, "peer " + in_quotes(host->peer().id) + " asked with senseless roads");
  }
  const auto acceptance =
      std::make_shared<roads::RoadAcceptance>(impl_->own_roads, std::move(host), std::move(on_link));
  return kit::encode_endpoint(acceptance->begin(asked, deadline));
}

/// On all roads or on none.
KVFERRY_INLINE void AutoTransferChannel::register_region(const LocalRegion& region) {
  std::size_t registered = 0;
  try {
    for (; registered < impl_->all_roads.size(); ++registered) {
      impl_->all_roads[registered]->register_region(region);
    }
  } catch (...) {
    for (std::size_t i = 0; i < registered; ++i) {
      if (impl_->forgetters[i]) {
        impl_->forgetters[i](region.number);
      }
    }
    throw;
  }
}

KVFERRY_INLINE std::function<void(std::uint32_t)> AutoTransferChannel::region_forgetter() {
  for (const auto& road : impl_->all_roads) {
    impl_->forgetters.push_back(road->region_forgetter());
  }
  return [forgetters = impl_->forgetters](std::uint32_t number) {
    for (const auto& forget : forgetters) {
      if (forget) {
        kit::if_memory_lasts([&] { forget(number); });  // the other roads forget it all the same
      }
    }
  };
}

KVFERRY_INLINE bool AutoTransferChannel::leaves_host_in_the_clear() const noexcept {
  return std::ranges::any_of(impl_->own_roads->roads, [](const roads::OwnRoad& own) {
    return own.road && !own.within_host && own.road->leaves_host_in_the_clear();
  });
}

KVFERRY_INLINE void AutoTransferChannel::stop_listening() {
  for (const auto& road : impl_->all_roads) {
    road->stop_listening();
  }
}

}  // namespace kvferry
