// SPDX-License-Identifier: Apache-2.0
#include "results.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <chrono>
#include <string_view>

#include "arguments.hpp"
#include "released.hpp"

namespace kvferry::python {
namespace {

nb::object type(const char* name) { return nb::module_::import_("kvferry._types").attr(name); }

nb::object name_or_none(const std::error_code& code) { return code ? nb::cast(error_name(code)) : nb::none(); }

std::string_view name_of(Access access) {
  switch (access) {
    case Access::none: return "none";
    case Access::read: return "read";
    case Access::write: return "write";
    case Access::read_write: return "read_write";
  }
  return "unknown";
}

nb::object to_python(const Notification& notification) {
  return type("Notification")(notification.peer_id, to_bytes(notification.payload), notification.incarnation,
                              notification.key);
}

nb::object to_python(const PeerEvent& event) {
  return type("PeerEvent")(to_string(event.kind), event.peer_id, event.incarnation, name_or_none(event.cause),
                           event.missed);
}

double seconds(std::chrono::nanoseconds duration) { return std::chrono::duration<double>(duration).count(); }

nb::dict to_python(const TransferStats& stats) {
  nb::dict failures;
  for (const auto& failure : stats.failures) {
    failures[nb::cast(error_name(failure.cause))] = failure.operations;
  }
  nb::dict latency;
  latency["count"] = stats.latency.count();
  latency["sum"] = seconds(stats.latency.sum);
  nb::list buckets;
  for (std::size_t i = 0; i + 1 < LatencyHistogram::bucket_count; ++i) {
    buckets.append(nb::make_tuple(seconds(LatencyHistogram::upper_bound(i)), stats.latency.counts[i]));
  }
  buckets.append(nb::make_tuple(std::numeric_limits<double>::infinity(), stats.latency.counts.back()));
  latency["buckets"] = buckets;

  nb::dict result;
  result["started"] = stats.started;
  result["succeeded"] = stats.succeeded;
  result["in_flight"] = stats.in_flight();
  result["failures"] = failures;
  result["objects"] = stats.objects;
  result["bytes"] = stats.bytes;
  result["latency"] = latency;
  return result;
}

nb::dict to_python(const std::vector<CauseCount>& counts) {
  nb::dict result;
  for (const auto& entry : counts) {
    result[nb::cast(error_name(entry.cause))] = entry.count;
  }
  return result;
}

}  // namespace

nb::object to_python(const PeerInfo& peer) {
  const IntoPython calling;
  nb::list regions;
  for (const RemoteRegion& region : peer.regions) {
    regions.append(type("RemoteRegion")(region.size, region.page_size, name_of(region.access), region.number));
  }
  return type("PeerInfo")(peer.id, peer.incarnation, peer.init_url, nb::tuple(regions), peer.path);
}

nb::object to_python(const SideMessage& message) {
  const IntoPython calling;
  return type("SideMessage")(message.type(), to_bytes(message.encoded()));
}

nb::object to_python(const Operation::Result& result) {
  struct Visitor {
    nb::object operator()(std::monostate) const { return nb::none(); }
    nb::object operator()(const std::optional<SideMessage>& answer) const {
      return answer ? to_python(*answer) : nb::none();
    }
    nb::object operator()(const std::vector<Notification>& notifications) const {
      nb::list all;
      for (const Notification& notification : notifications) {
        all.append(to_python(notification));
      }
      return all;
    }
    nb::object operator()(const PeerInfo& peer) const { return to_python(peer); }
    nb::object operator()(const Notification& notification) const { return to_python(notification); }
    nb::object operator()(const PeerEvent& event) const { return to_python(event); }
  };
  const IntoPython calling;
  return std::visit(Visitor{}, result);
}

nb::dict to_python(const ChannelStats& stats) {
  nb::dict transfers;
  for (const auto kind : {TransferKind::send, TransferKind::recv, TransferKind::write, TransferKind::read}) {
    transfers[nb::cast(to_string(kind))] = to_python(stats.of(kind));
  }
  nb::dict handshakes;
  handshakes["dialed"] = stats.handshakes.dialed;
  handshakes["accepted"] = stats.handshakes.accepted;
  handshakes["reconnected"] = stats.handshakes.reconnected;
  handshakes["failed"] = to_python(stats.handshakes.failed);
  handshakes["refused"] = to_python(stats.handshakes.refused);
  nb::dict peers;
  for (const PeerStats& peer : stats.peers) {
    nb::dict entry;
    entry["connected"] = peer.connected;
    entry["connects"] = peer.connects;
    entry["succeeded"] = peer.succeeded;
    entry["failed"] = peer.failed;
    entry["bytes"] = peer.bytes;
    peers[nb::cast(peer.id)] = entry;
  }
  nb::list paths;
  for (const PathStats& path : stats.paths) {
    nb::dict entry;
    entry["name"] = path.name;
    entry["bytes_out"] = path.bytes_out;
    entry["bytes_in"] = path.bytes_in;
    paths.append(entry);
  }
  nb::list roads;
  for (const RoadStats& road : stats.roads) {
    nb::dict entry;
    entry["name"] = road.name;
    entry["taken"] = road.taken;
    entry["fallbacks"] = road.fallbacks;
    roads.append(entry);
  }

  nb::dict result;
  result["transport"] = stats.transport;
  result["connected_peers"] = stats.connected_peers;
  result["identity_conflicts"] = stats.identity_conflicts;
  result["peer_replacements"] = stats.peer_replacements;
  result["checksum_mismatches"] = stats.checksum_mismatches;
  result["pending_notifications"] = stats.pending_notifications;
  result["handshakes"] = handshakes;
  result["refused_strangers"] = to_python(stats.refused_strangers);
  result["peers"] = peers;
  result["transfers"] = transfers;
  result["paths"] = paths;
  result["roads"] = roads;
  return result;
}

}  // namespace kvferry::python
