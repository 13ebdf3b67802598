// SPDX-License-Identifier: Apache-2.0
#include "channel_options.hpp"

#include <kvferry/auto_transfer_channel.hpp>
#include <kvferry/keyring.hpp>
#include <kvferry/shm_transfer_channel.hpp>
#include <kvferry/tcp_transfer_channel.hpp>
#if KVFERRY_PYTHON_RDMA
#include <kvferry/rdma_transfer_channel.hpp>
#endif

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <tuple>
#include <utility>

#include "arguments.hpp"
#include "released.hpp"
#include "verbs_at_run_time.hpp"

namespace kvferry::python {
namespace {

void read(Arguments& given, ChannelOptions& options) {
  given.read("peer_init_url", options.peer_init_url);
  given.read("advertised_init_url", options.advertised_init_url);
  given.read("peer_lookup_url", options.peer_lookup_url);
  given.read("require_equal_page_sizes", options.require_equal_page_sizes);
  given.read("checksums", options.checksums);
  if (std::pair<std::string, std::string> files; given.read("keyring", files)) {
    KeyPair own = read_key_pair(files.first);  // in this order, whatever the compiler prefers: so go the errors
    options.keyring = std::make_shared<Keyring>(std::move(own), read_peer_keys(files.second));
  }
  given.read("require_encryption", options.require_encryption);
  given.read("max_peers", options.max_peers);
  given.read("default_timeout", options.default_timeout);
  given.read("handshake_timeout", options.handshake_timeout);
  given.read("max_pending_operations", options.max_pending_operations);
  given.read("max_pending_peer_events", options.max_pending_peer_events);
  given.read("max_pending_notifications", options.max_pending_notifications);
  given.read("max_pending_notifications_of_peer", options.max_pending_notifications_of_peer);
  given.read("max_pending_notification_bytes", options.max_pending_notification_bytes);
  given.read("max_pending_notification_bytes_of_peer", options.max_pending_notification_bytes_of_peer);
  given.read("max_posted_recv_bytes", options.max_posted_recv_bytes);
  given.read("max_posted_recv_bytes_of_peer", options.max_posted_recv_bytes_of_peer);
  given.read("max_pending_side_message_bytes", options.max_pending_side_message_bytes);
  given.read("max_pending_side_message_bytes_of_source", options.max_pending_side_message_bytes_of_source);
  given.read("max_handshake_bytes", options.max_handshake_bytes);
  given.read("io_threads", options.io_threads);
  given.read("poll_spin", options.poll.spin);
}

Encryption encryption_named(const std::string& name) {
  if (name == "with_keyring") {
    return Encryption::with_keyring;
  }
  if (name == "off") {
    return Encryption::off;
  }
  if (name == "required") {
    return Encryption::required;
  }
  throw wrong_value("encryption can't be '" + name + "': there are 'with_keyring', 'off' and 'required'");
}

void read(Arguments& given, TcpOptions& options) {
  read(given, static_cast<ChannelOptions&>(options));
  given.read("data_host", options.data_host);
  given.read("data_port", options.data_port);
  given.read("advertised_data_address", options.advertised_data_address);
  given.read("allowed_hosts", options.allowed_hosts);
  if (std::string name; given.read("encryption", name)) {
    options.encryption = encryption_named(name);
  }
  if (std::tuple<std::string, std::string, std::string> files; given.read("certificates", files)) {
    options.certificates = {std::get<0>(files), std::get<1>(files), std::get<2>(files)};
  }
  given.read("lanes_per_peer", options.lanes_per_peer);
  given.read("stripe_threshold", options.stripe_threshold);
  given.read("drain_timeout", options.drain_timeout);
  given.read("hello_timeout", options.hello_timeout);
  given.read("frame_timeout", options.frame_timeout);
  given.read("send_buffer", options.send_buffer);
  given.read("receive_buffer", options.receive_buffer);
  given.read("congestion_control", options.congestion_control);
  given.read("same_host_congestion_control", options.same_host_congestion_control);
  given.read("keepalive_idle", options.keepalive_idle);
  given.read("user_timeout", options.user_timeout);
}

void read(Arguments& given, ShmOptions& options) {
  read(given, static_cast<ChannelOptions&>(options));
  given.read("allowed_users", options.allowed_users);
  given.read("process_memory", options.process_memory);
  given.read("process_memory_threshold", options.process_memory_threshold);
  given.read("drain_timeout", options.drain_timeout);
  given.read("frame_timeout", options.frame_timeout);
}

#if KVFERRY_PYTHON_RDMA
void read(Arguments& given, RdmaOptions& options) {
  read(given, static_cast<ChannelOptions&>(options));
  if (const nb::object rails = given.take("rails"); rails.is_valid()) {
    const nb::object type = nb::module_::import_("kvferry._types").attr("RdmaRail");
    for (const nb::handle rail : converted<nb::sequence>(rails, "rails")) {
      if (!nb::isinstance(rail, type)) {
        throw wrong_type("rails are RdmaRail, not " + nb::cast<std::string>(nb::repr(rail)));
      }
      options.rails.push_back(
          {converted<std::string>(rail.attr("device"), "a rail's device"),
           converted<std::uint8_t>(rail.attr("port"), "a rail's port"),
           converted<std::optional<std::uint32_t>>(rail.attr("gid_index"), "a rail's gid_index"),
           converted<std::optional<std::uint16_t>>(rail.attr("partition_key"), "a rail's partition_key")});
    }
  }
  given.read("stripe_threshold", options.stripe_threshold);
  given.read("queue_pairs_per_rail", options.queue_pairs_per_rail);
  given.read("queue_pair_threshold", options.queue_pair_threshold);
  given.read("slice_bytes", options.slice_bytes);
  given.read("relaxed_ordering", options.relaxed_ordering);
  given.read("queue_depth", options.queue_depth);
  given.read("read_depth", options.read_depth);
  given.read("eager_bytes", options.eager_bytes);
  given.read("ack_timeout", options.ack_timeout);
  given.read("retry_count", options.retry_count);
  given.read("keepalive_interval", options.keepalive_interval);
  given.read("drain_timeout", options.drain_timeout);
  given.read("parts_timeout", options.parts_timeout);
  given.read("trusted_fabric", options.trusted_fabric);
  given.read("isolate_peers", options.isolate_peers);
  given.read("service_level", options.service_level);
  given.read("traffic_class", options.traffic_class);
}
#endif

template <class Transport, class Options>
AutoRoad road_over(const nb::handle given, std::string name, bool within_host = false) {
  Options options;
  Arguments arguments(converted<nb::dict>(given, "a road's options"));
  read(arguments, options);
  arguments.finish("a road");
  return road<Transport>(std::move(name), std::move(options), within_host);
}

AutoRoad road_of(const nb::handle given) {
  if (!nb::isinstance(given, nb::module_::import_("kvferry._types").attr("Road"))) {
    throw wrong_type("roads are Road, not " + nb::cast<std::string>(nb::repr(given)));
  }
  const auto transport = converted<std::string>(given.attr("transport"), "a road's transport");
  auto name = converted<std::string>(given.attr("name"), "a road's name");
  if (name.empty()) {
    name = transport;
  }
  const nb::object options = given.attr("options");
  if (transport == "shm") {
    return road_over<ShmTransferChannel, ShmOptions>(options, std::move(name), true);
  }
  if (transport == "tcp") {
    return road_over<TcpTransferChannel, TcpOptions>(options, std::move(name));
  }
#if KVFERRY_PYTHON_RDMA
  if (transport == "rdma") {
    AutoRoad made = road_over<RdmaTransferChannel, RdmaOptions>(options, std::move(name));
    made.make = [make = std::move(made.make)](ChannelOptions common) {
      need_verbs();
      return make(std::move(common));
    };
    return made;
  }
#endif
  throw wrong_value("a road's transport can't be '" + transport + "' in this build of kvferry");
}

void read(Arguments& given, AutoOptions& options) {
  read(given, static_cast<ChannelOptions&>(options));
  if (const nb::object roads = given.take("roads"); roads.is_valid()) {
    for (const nb::handle road : converted<nb::sequence>(roads, "roads")) {
      options.roads.push_back(road_of(road));
    }
  }
  given.read("require", options.require);
  given.read("allow_unencrypted", options.allow_unencrypted);
  given.read("road_timeout", options.road_timeout);
}

/// A channel whose side messages a Python function answers.
template <class Transport>
class Answering final : public Transport {
 public:
  template <class Options>
  Answering(Options options, const SideMessageHandler& handler) : Transport(std::move(options)), handler_(handler) {}
  Answering(const Answering&) = delete;
  Answering& operator=(const Answering&) = delete;
  ~Answering() override { this->close(); }

  SideMessage handle_init_side_msg(const SideMessage& message) override { return handler_.answer(message); }
  using Transport::answer_side_messages;
  using Transport::answers_in_this_thread;

 private:
  const SideMessageHandler& handler_;
};

template <class Transport, class Options>
MadeChannel make(const nb::dict& given, const Regions& regions, const SideMessageHandler* handler) {
  Options options;
  Arguments arguments(given);
  read(arguments, options);
  arguments.finish("a channel");
  for (const auto& [number, region] : regions) {
    options.regions.push_back(region.described);
  }
  const Released released;  // names are looked up, memory is registered
  MadeChannel made;
  std::shared_ptr<Transport> channel;
  if (handler == nullptr) {
    channel = std::make_shared<Transport>(std::move(options));
    made.answer_side_messages = [] {};
  } else {
    options.hold_side_messages = true;
    const auto answering = std::make_shared<Answering<Transport>>(std::move(options), *handler);
    made.answer_side_messages = [one = answering.get()] { one->answer_side_messages(); };
    made.would_wait_for_itself = [one = answering.get()](std::string_view url) {
      return one->answers_in_this_thread(url);
    };
    channel = answering;
  }
  made.own_answer = [one = channel.get()](const SideMessage& message) {
    return one->Transport::handle_init_side_msg(message);
  };
  made.channel = std::move(channel);
  return made;
}

}  // namespace

MadeChannel make_channel(const std::string& transport, const nb::dict& options, const Regions& regions,
                         const SideMessageHandler* handler) {
  if (transport == "tcp") {
    return make<TcpTransferChannel, TcpOptions>(options, regions, handler);
  }
  if (transport == "shm") {
    return make<ShmTransferChannel, ShmOptions>(options, regions, handler);
  }
  if (transport == "auto") {
    return make<AutoTransferChannel, AutoOptions>(options, regions, handler);
  }
#if KVFERRY_PYTHON_RDMA
  if (transport == "rdma") {
    need_verbs();
    return make<RdmaTransferChannel, RdmaOptions>(options, regions, handler);
  }
#endif
  throw TransferError(errc::not_supported, "this build of kvferry has no transport '" + transport + "'");
}

}  // namespace kvferry::python
