// SPDX-License-Identifier: Apache-2.0
#include "channel_bindings.hpp"

#include <kvferry/channel_stats.hpp>
#include <kvferry/side_message_codec.hpp>

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "channel.hpp"
#include "channel_registry.hpp"
#include "released.hpp"
#include "results.hpp"
#include "transfer_request.hpp"

namespace kvferry::python {
namespace {

std::shared_ptr<Operation> named(const char* name) {
  auto operation = std::make_shared<Operation>();
  operation->name = name;
  return operation;
}

const char* name_of(TransferKind kind) {
  switch (kind) {
    case TransferKind::send: return "batched_send";
    case TransferKind::recv: return "batched_recv";
    case TransferKind::write: return "batched_write";
    case TransferKind::read: return "batched_read";
  }
  return "transfer";
}

std::shared_ptr<Operation> transfer(const Channel& self, const std::string& kind, nb::handle objects,
                                    const nb::str& peer_id, const nb::dict& spec, Queue* queue) {
  auto operation = named(name_of(kind_of(kind)));
  TransferRequest request = make_request(kind_of(kind), objects, text_of(peer_id), spec, self.regions(), *operation);
  return launch(std::move(operation), queue, [&](CompletionToken<void> token) {
    return self.native().async_transfer(std::move(request), std::move(token));
  });
}

InitSpec init_spec(std::optional<double> timeout, Operation& operation) {
  return {.timeout = timeout_of(timeout), .diagnostic = &operation.diagnostic};
}

std::optional<SideMessage> message_of(const std::optional<nb::bytes>& encoded) {
  if (!encoded) {
    return std::nullopt;
  }
  return parse_side_message(bytes_of(*encoded));
}

using Timeout = std::optional<double>;

std::shared_ptr<Operation> init_peer(const Channel& self, const nb::str& local_id, const nb::str& peer_id,
                                     const nb::str& url, const std::optional<nb::bytes>& encoded, Timeout timeout,
                                     Queue* queue) {
  auto operation = named("lazy_init_peer_connection");
  const InitSpec spec = init_spec(timeout, *operation);
  return launch_for<std::optional<SideMessage>>(std::move(operation), queue, [&](auto token) {
    return self.native().async_lazy_init_peer_connection(text_of(local_id), text_of(peer_id), text_of(url),
                                                         message_of(encoded), spec, std::move(token));
  });
}

std::shared_ptr<Operation> send_message(const Channel& self, const nb::str& url, const nb::bytes& encoded,
                                        Timeout timeout, Queue* queue) {
  auto operation = named("send_init_side_msg");
  const std::string to = text_of(url);
  if (queue == nullptr) {
    self.check_url(to);
  }
  const InitSpec spec = init_spec(timeout, *operation);
  return launch_for<std::optional<SideMessage>>(std::move(operation), queue, [&](auto token) {
    return self.native().async_send_init_side_msg(to, parse_side_message(bytes_of(encoded)), spec, std::move(token));
  });
}

std::shared_ptr<Operation> connect(const Channel& self, const nb::str& local_id, const nb::bytes& metadata,
                                   Timeout timeout, Queue* queue) {
  auto operation = named("connect");
  const InitSpec spec = init_spec(timeout, *operation);
  return launch_for<PeerInfo>(std::move(operation), queue, [&](auto token) {
    return self.native().async_connect(text_of(local_id), bytes_of(metadata), spec, std::move(token));
  });
}

std::shared_ptr<Operation> notify(const Channel& self, const nb::str& peer_id, const nb::bytes& payload,
                                  std::uint64_t key, Timeout timeout, Queue* queue) {
  auto operation = named("notify");
  const NotifySpec spec{.key = key, .timeout = timeout_of(timeout), .diagnostic = &operation->diagnostic};
  return launch(std::move(operation), queue, [&](CompletionToken<void> token) {
    return self.native().async_notify(text_of(peer_id), bytes_of(payload), spec, std::move(token));
  });
}

/// What was taken before a signal's handler raised isn't lost: the channel keeps it.
/// @param seen given by those who have looked for what is kept: `kept()` before they did.
/// @param started gets the operation, before a handler can keep the caller from getting it as the result.
/// @return null if something has been kept since then.
template <class Result, class Start>
std::shared_ptr<Operation> receive(Channel& self, const char* name, Channel::Kind kind, Queue* queue,
                                   std::optional<std::uint64_t> seen, std::optional<nb::list> started, Start start) {
  struct HasBeenKept {};
  const auto operation = named(name);
  try {
    launch_for<Result>(operation, queue, [&](auto token) {
      if (seen) {
        if (*seen != self.kept()) {
          throw HasBeenKept();
        }
        self.begin_receiving(operation, kind);
      }
      return start(std::move(token));
    });
    if (started) {
      started->append(to_object(operation));
    }
    return operation;
  } catch (const HasBeenKept&) {
    return nullptr;
  } catch (...) {
    if (operation->end) {
      self.leave(operation);
    }
    throw;
  }
}

std::shared_ptr<Operation> remove_region(Channel& self, std::uint32_t number, Timeout timeout, Queue* queue) {
  self.let_removed_go();
  auto operation = named("remove_region");
  const bool leaves = self.native().capabilities().region_changes;
  if (leaves) {
    self.leave(number, operation);  // from here on nothing of this side begins there
  }
  bool started = false;
  try {
    launch(operation, queue, [&](CompletionToken<void> token) {
      auto handle = self.native().async_remove_region(number, timeout_of(timeout), std::move(token));
      started = true;
      return handle;
    });
  } catch (...) {
    if (leaves && !started) {
      self.take_back(number, operation);
    }
    throw;
  }
  if (queue == nullptr) {
    self.let_removed_go();
  }
  return operation;
}

nb::dict capabilities_of(const Channel& self) {
  const Capabilities able = self.native().capabilities();
  nb::dict result;
  result["send_recv"] = able.send_recv;
  result["write"] = able.write;
  result["read"] = able.read;
  result["notifications"] = able.notifications;
  result["ranges"] = able.ranges;
  result["checksums"] = able.checksums;
  result["region_changes"] = able.region_changes;
  result["unregistered_objects"] = able.unregistered_objects;
  result["max_notification_bytes"] = able.max_notification_bytes;
  return result;
}

nb::object peer_info(const Channel& self, const nb::str& peer_id) {
  const auto peer = self.native().peer_info(text_of(peer_id));
  return peer ? to_python(*peer) : nb::none();
}

std::vector<std::uint64_t> local_indexes(const Channel& self, const nb::list& objects, std::uint32_t region) {
  std::vector<ConstBuffer> buffers;
  for (const nb::handle object : objects) {
    buffers.emplace_back(Memory(object, false).bytes());
  }
  return self.native().get_local_mem_indices(ConstObjects(std::move(buffers)), region);
}

std::string prometheus_of(const std::vector<std::pair<const Channel*, std::map<std::string, std::string>>>& channels) {
  std::vector<ChannelStats> stats;
  for (const auto& [channel, labels] : channels) {
    stats.push_back(channel->native().stats());
    stats.back().labels = labels;
  }
  return to_prometheus(stats);
}

void bind_operations(nb::class_<Channel>& channel) {
  const auto timeout = nb::arg("timeout").none();
  const auto queue = nb::arg("queue").none();
  const auto seen = nb::arg("seen").none() = nb::none();
  const auto started = nb::arg("started").none() = nb::none();
  using Seen = std::optional<std::uint64_t>;
  using Started = std::optional<nb::list>;
  channel.def("transfer", &transfer, nb::arg("kind"), nb::arg("objects"), nb::arg("peer_id"), nb::arg("spec"), queue)
      .def("init_peer", &init_peer, nb::arg("local_id"), nb::arg("peer_id"), nb::arg("url"), nb::arg("encoded").none(),
           timeout, queue)
      .def("send_message", &send_message, nb::arg("url"), nb::arg("encoded"), timeout, queue)
      .def("connect", &connect, nb::arg("local_id"), nb::arg("metadata"), timeout, queue)
      .def("notify", &notify, nb::arg("peer_id"), nb::arg("payload"), nb::arg("key"), timeout, queue)
      .def(
          "disconnect",
          [](const Channel& self, const nb::str& peer_id, Queue* of) {
            return launch(named("disconnect"), of, [&](CompletionToken<void> token) {
              return self.native().async_disconnect(text_of(peer_id), std::move(token));
            });
          },
          nb::arg("peer_id"), queue)
      .def(
          "fence",
          [](const Channel& self, const nb::str& peer_id, Timeout within, Queue* of) {
            return launch(named("fence"), of, [&](CompletionToken<void> token) {
              return self.native().async_fence(text_of(peer_id), timeout_of(within), std::move(token));
            });
          },
          nb::arg("peer_id"), timeout, queue)
      .def("remove_region", &remove_region, nb::arg("number"), timeout, queue)
      .def(
          "receive_notification",
          [](Channel& self, Timeout within, Queue* of, Seen kept, Started list) {
            return receive<Notification>(self, "receive_notification", 0, of, kept, std::move(list), [&](auto token) {
              return self.native().async_receive_notification(timeout_of(within), std::move(token));
            });
          },
          timeout, queue, seen, started)
      .def(
          "receive_notifications",
          [](Channel& self, std::uint64_t key, std::size_t count, Timeout within, Queue* of, Seen kept, Started list) {
            return receive<std::vector<Notification>>(
                self, "receive_notifications", key, of, kept, std::move(list), [&](auto token) {
                  return self.native().async_receive_notifications(key, count, timeout_of(within), std::move(token));
                });
          },
          nb::arg("key"), nb::arg("count"), timeout, queue, seen, started)
      .def(
          "wait_peer_event",
          [](Channel& self, Timeout within, Queue* of, Seen kept, Started list) {
            return receive<PeerEvent>(
                self, "wait_peer_event", std::nullopt, of, kept, std::move(list),
                [&](auto token) { return self.native().async_wait_peer_event(timeout_of(within), std::move(token)); });
          },
          timeout, queue, seen, started);
}

}  // namespace

void bind_channel(nb::module_& module) {
  nb::class_<Channel> channel(module, "Channel");
  channel
      .def(nb::init<const std::string&, const nb::list&, const nb::dict&, nb::object>(), nb::arg("transport"),
           nb::arg("regions"), nb::arg("options"), nb::arg("handler").none())
      .def("answer_side_messages", &Channel::answer_side_messages)
      .def("close", &Channel::close)
      .def("take_unclaimed", &Channel::take_unclaimed, nb::arg("left"))
      .def_prop_ro("kept", &Channel::kept)
      .def_prop_ro("receiving", &Channel::receiving)
      .def("look_again", &Channel::look_again, nb::arg("key").none())
      .def_prop_ro("transport", [](const Channel& self) { return self.native().transport(); })
      .def_prop_ro("incarnation", [](const Channel& self) { return self.native().incarnation(); })
      .def_prop_ro("peer_init_url", [](const Channel& self) { return self.native().peer_init_url(); })
      .def("capabilities", &capabilities_of)
      .def("peer_info", &peer_info, nb::arg("peer_id"))
      .def("peers",
           [](const Channel& self) {
             nb::list all;
             for (const PeerInfo& peer : self.native().peers()) {
               all.append(to_python(peer));
             }
             return all;
           })
      .def(
          "exists",
          [](const Channel& self, const nb::str& id) { return self.native().remote_xfer_handler_exists(text_of(id)); },
          nb::arg("peer_id"))
      .def(
          "local_metadata",
          [](const Channel& self, const nb::str& id) { return to_bytes(self.native().local_metadata(text_of(id))); },
          nb::arg("local_id"))
      .def("add_region", &Channel::add_region, nb::arg("region"))
      .def("let_removed_go", &Channel::let_removed_go)
      .def("local_mem_indices", &local_indexes, nb::arg("objects"), nb::arg("region"))
      .def(
          "own_answer",
          [](const Channel& self, const nb::bytes& encoded) {
            return to_bytes(self.own_answer(parse_side_message(bytes_of(encoded))).encoded());
          },
          nb::arg("encoded"))
      .def("stats", [](const Channel& self) { return to_python(self.native().stats()); });
  bind_operations(channel);
  module.def("to_prometheus", &prometheus_of, nb::arg("channels"));
  module.def("close_all", &ChannelRegistry::close_all);
  module.def("wait_for_threads", &InterpreterExit::wait_for_threads);
  module.def("forget_threads", &InterpreterExit::forget_threads);
  module.def(
      "message_type", [](const nb::bytes& encoded) { return parse_side_message(bytes_of(encoded)).type(); },
      nb::arg("encoded"));
}

}  // namespace kvferry::python
