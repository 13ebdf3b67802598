// SPDX-License-Identifier: Apache-2.0
#include "channel.hpp"

#include <kvferry/side_message_codec.hpp>

#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "released.hpp"
#include "results.hpp"
#include "transfer_request.hpp"

namespace kvferry::python {
namespace {

class Channel;

/// A channel whose last reference a handler let go on a thread of the channel's own, which can't destroy it, and may call
/// the handler again for messages that it holds.
struct Leftover {
  std::unique_ptr<SideMessageHandler> handler;
  std::shared_ptr<BaseTransferChannel> channel;
};

/// Those that there are, and those that are left. With the GIL. Never destroyed.
struct Registry {
  std::set<Channel*> channels;
  std::vector<Leftover> to_be_destroyed;
};

Registry& registry() {
  static auto* const made = new Registry;
  return *made;
}

void destroy_leftovers() {
  if (!InterpreterExit::is_waited_for && !registry().to_be_destroyed.empty()) {
    auto leftovers = std::exchange(registry().to_be_destroyed, {});
    {
      const Released released;
      for (Leftover& leftover : leftovers) {
        leftover.channel.reset();
      }
    }
    leftovers.clear();  // the handlers, with the GIL
  }
}

/// Of what an operation receives: notifications of a key, 0 for those without one, or news of peers.
using Kind = std::optional<std::uint64_t>;

Kind kind_received(const Operation::Result& received) {
  if (const auto* one = std::get_if<Notification>(&received)) {
    return one->key;
  }
  const auto* several = std::get_if<std::vector<Notification>>(&received);
  return several != nullptr && !several->empty() ? Kind(several->front().key) : Kind();
}

/// An operation that is started anew if something of its kind is kept meanwhile, which it would not see.
struct Receiving {
  std::weak_ptr<Operation> operation;
  Kind kind;
};

/// A region that is being removed.
struct Leaving {
  std::optional<Region> region;  ///< Not there: there was none when the removal was started.
  std::vector<std::shared_ptr<Operation>> removals;
};

class Channel {
 public:
  Channel(const std::string& transport, const nb::list& regions, const nb::dict& options, nb::object handler) {
    refuse_at_exit();
    destroy_leftovers();
    for (const nb::handle region : regions) {
      regions_.emplace(static_cast<std::uint32_t>(regions_.size()), converted<Region>(region, "a region"));
    }
    if (!handler.is_none()) {
      handler_ = std::make_unique<SideMessageHandler>(std::move(handler));
    }
    made_ = make_channel(transport, options, regions_, handler_.get());
    registry().channels.insert(this);
  }
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;
  ~Channel() {
    registry().channels.erase(this);
    if (!made_.channel) {
      return;
    }
    const bool elsewhere = InterpreterExit::is_waited_for;
    {
      const Released released;
      made_.channel->close();
      if (!elsewhere) {
        made_.channel.reset();
      }
    }
    if (elsewhere) {
      registry().to_be_destroyed.push_back({std::move(handler_), std::move(made_.channel)});
    }
  }

  [[nodiscard]] BaseTransferChannel& native() const noexcept { return *made_.channel; }
  [[nodiscard]] std::shared_ptr<BaseTransferChannel> share() const noexcept { return made_.channel; }
  [[nodiscard]] const Regions& regions() const noexcept { return regions_; }

  std::uint32_t add_region(nb::handle given) {
    let_removed_go();
    Region region = converted<Region>(given, "a region");
    const std::uint32_t number = [&] {
      const Released released;  // memory is registered
      return native().add_region(region.described);
    }();
    regions_.emplace(number, std::move(region));
    return number;
  }

  /// Takes a region out, and keeps its memory until its removal has ended.
  void leave(std::uint32_t number, std::shared_ptr<Operation> removal) {
    Leaving& leaving = leaving_[number];
    leaving.removals.push_back(std::move(removal));
    if (auto node = regions_.extract(number)) {
      leaving.region = std::move(node.mapped());
    }
  }
  /// A removal that could not be started.
  void take_back(std::uint32_t number, const std::shared_ptr<Operation>& removal) {
    if (const auto it = leaving_.find(number); it != leaving_.end()) {
      std::erase(it->second.removals, removal);
    }
    let_removed_go();
  }
  /// References to the memory of regions that have been removed go. Regions whose removal was refused are there again.
  void let_removed_go() {
    std::vector<Region> gone;  // their exporters' code may run, and call this
    for (auto it = leaving_.begin(); it != leaving_.end();) {
      Leaving& leaving = it->second;
      bool removed = false;
      std::erase_if(leaving.removals, [&](const auto& operation) {
        const bool ended = operation->look();
        // Who comes too late has nothing to wait for.
        removed = removed || (ended && (!operation->end->error || operation->end->error == errc::region_gone));
        return ended;
      });
      const bool refused =
          !removed && leaving.removals.empty() && find_region(native().regions(), it->first) != nullptr;
      if (refused && leaving.region) {
        regions_.emplace(it->first, std::move(*leaving.region));
      } else if (removed && leaving.region) {
        gone.push_back(std::move(*leaving.region));
      }
      // One whose removal nobody waits for any more may be in use still: until another call has waited, or `close`.
      const bool over = removed || refused || (leaving.removals.empty() && !leaving.region);
      it = over ? leaving_.erase(it) : std::next(it);
    }
  }

  void answer_side_messages() const {
    const Released released;
    made_.answer_side_messages();
  }

  /// For calls that block. @throws TransferError errc::would_deadlock
  void check_url(const std::string& url) const {
    if (made_.would_wait_for_itself && made_.would_wait_for_itself(url)) {
      throw TransferError(errc::would_deadlock,
                          "handle_init_side_msg waits for a message to its own channel, which only it could answer");
    }
  }

  [[nodiscard]] SideMessage own_answer(const SideMessage& message) const { return made_.own_answer(message); }

  /// Keeps an operation that had taken something when the call that waited for it was interrupted.
  void leave(std::shared_ptr<Operation> operation) {
    const Kind kind = kind_received(operation->result);
    unclaimed_.push_back(std::move(operation));
    look_again(kind);
  }
  [[nodiscard]] std::vector<std::shared_ptr<Operation>> take_unclaimed() { return std::exchange(unclaimed_, {}); }
  /// How often something has been kept.
  [[nodiscard]] std::uint64_t kept() const noexcept { return kept_; }
  /// Something has been kept: those who wait for its kind are cancelled, to look for it.
  void look_again(Kind kind) {
    ++kept_;
    for (const Receiving& one : receiving_) {
      if (const auto operation = one.operation.lock(); operation && one.kind == kind) {
        operation->handle.cancel();
      }
    }
  }
  void begin_receiving(const std::shared_ptr<Operation>& operation, Kind kind) {
    forget_received();
    receiving_.push_back({operation, kind});
  }
  /// How many wait for what is kept.
  [[nodiscard]] std::size_t receiving() {
    forget_received();
    return receiving_.size();
  }

  void close() {
    {
      const Released released;
      made_.channel->close();
    }
    // Nobody touches the memory any more. Its exporters' code may run, and call this: not while the maps are looked through.
    std::vector<std::shared_ptr<Memory>> gone;
    for (auto& [number, region] : regions_) {
      gone.push_back(std::move(region.memory));
    }
    const auto left = std::exchange(leaving_, {});
  }

 private:
  void forget_received() {
    std::erase_if(receiving_, [](const Receiving& one) {
      const auto other = one.operation.lock();
      return !other || other->handle.ended();
    });
  }

  Regions regions_;
  std::map<std::uint32_t, Leaving> leaving_;
  std::unique_ptr<SideMessageHandler> handler_;
  MadeChannel made_;
  std::vector<std::shared_ptr<Operation>> unclaimed_;
  std::vector<Receiving> receiving_;
  std::uint64_t kept_ = 0;
};

void close_all() {
  InterpreterExit::begin();
  std::vector<std::shared_ptr<BaseTransferChannel>> channels;
  for (const Channel* channel : registry().channels) {
    channels.push_back(channel->share());
  }
  const nb::gil_scoped_release released;
  for (const auto& channel : channels) {
    channel->close();
  }
  channels.clear();
}

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
std::shared_ptr<Operation> receive(Channel& self, const char* name, Kind kind, Queue* queue,
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

SideMessage SideMessageHandler::answer(const SideMessage& message) const {
  if (InterpreterExit::has_begun()) {
    throw TransferError(errc::closed, "the interpreter of the channel's program is exiting");
  }
  const nb::gil_scoped_acquire acquired;
  InterpreterExit::is_waited_for = true;
  struct Leaving {
    ~Leaving() { InterpreterExit::is_waited_for = false; }
  } const leaving;
  try {
    const nb::object answer = function_(message.type(), to_bytes(message.encoded()));
    if (nb::isinstance<nb::bytes>(answer)) {
      return parse_side_message(bytes_of(nb::cast<nb::bytes>(answer)));
    }
    const auto [code, sentence] = nb::cast<std::pair<int, std::string>>(answer);
    throw TransferError(static_cast<errc>(code), sentence);
  } catch (nb::python_error& raised) {
    // Nor is the peer told where in this program it happened.
    const auto name = nb::cast<std::string>(raised.type().attr("__name__"));
    raised.discard_as_unraisable("handle_init_side_msg");
    throw TransferError(errc::handshake_failed, name);
  }
}

void bind_channel(nb::module_& module) {
  nb::class_<Channel> channel(module, "Channel");
  channel
      .def(nb::init<const std::string&, const nb::list&, const nb::dict&, nb::object>(), nb::arg("transport"),
           nb::arg("regions"), nb::arg("options"), nb::arg("handler").none())
      .def("answer_side_messages", &Channel::answer_side_messages)
      .def("close", &Channel::close)
      .def("take_unclaimed", &Channel::take_unclaimed)
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
  module.def("close_all", &close_all);
  module.def("wait_for_threads", &InterpreterExit::wait_for_threads);
  module.def("forget_threads", &InterpreterExit::forget_threads);
  module.def(
      "message_type", [](const nb::bytes& encoded) { return parse_side_message(bytes_of(encoded)).type(); },
      nb::arg("encoded"));
}

}  // namespace kvferry::python
