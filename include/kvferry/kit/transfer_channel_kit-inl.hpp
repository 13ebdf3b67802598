// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/transfer_channel_kit.hpp>

#include <asio/error.hpp>
#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <asio/thread_pool.hpp>

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#include <kvferry/kit/handshake_service.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include <kvferry/detail/host_address.hpp>
#include <kvferry/detail/process.hpp>
#include <kvferry/detail/standard_descriptors.hpp>
#include <kvferry/detail/text.hpp>
#include <kvferry/detail/thread.hpp>

#include <kvferry/kit/blocking_transfer.hpp>
#include <kvferry/kit/checks.hpp>
#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/fence.hpp>
#include <kvferry/kit/init_exchange.hpp>
#include <kvferry/kit/io_threads.hpp>
#include <kvferry/kit/notification_queue.hpp>
#include <kvferry/kit/operation_registry.hpp>
#include <kvferry/kit/peer_directory.hpp>
#include <kvferry/kit/peer_metadata.hpp>
#include <kvferry/kit/region_removals.hpp>
#include <kvferry/kit/region_table.hpp>
#include <kvferry/kit/road.hpp>
#include <kvferry/kit/side_message_queue.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

KVFERRY_INLINE std::uint64_t random_incarnation() {
  std::random_device device;
  const std::uint64_t high = device();
  // Never 0, which stands for "none".
  return (high << 32 | device()) | 1;
}

KVFERRY_INLINE std::string advertised_url(const ChannelOptions& options, const std::string& bound) {
  if (bound.empty() || options.advertised_init_url.empty()) {
    return bound;
  }
  HostPort advertised = parse_url(options.advertised_init_url);
  if (advertised.port == 0) {
    advertised.port = parse_url(bound).port;
  }
  return advertised.to_url();
}

/// A blocking call's thread at a link's service, where the link has a use for it.
class Serving {
 public:
  Serving(std::shared_ptr<Link> link, const TransferRequest& request) : link_(std::move(link)) {
    if (link_ && (link_->ends_at_once(request) || !link_->begin_serving())) {
      link_.reset();
    }
  }
  Serving(const Serving&) = delete;
  Serving& operator=(const Serving&) = delete;
  ~Serving() {
    if (link_) {
      link_->end_serving();
    }
  }

  explicit operator bool() const noexcept { return link_ != nullptr; }
  Link* operator->() const noexcept { return link_.get(); }

 private:
  std::shared_ptr<Link> link_;
};

/// Whether a kvferry channel asks who is here, and not one of LMCache's.
KVFERRY_INLINE bool is_greeting(const SideMessage& message) {
  std::error_code ec;
  return message.is<Greeting>() && decode_side_message<Greeting>(message, ec).kvferry.has_value() && !ec;
}

KVFERRY_INLINE void say_forked(std::string* diagnostic) {
  if (diagnostic != nullptr) {
    *diagnostic = "the channel belongs to the process that this one was forked from; make another one here";
  }
}

class OneThreadPool : public asio::thread_pool {
 public:
  /// @param wanted otherwise there is none, and nothing is to be posted.
  explicit OneThreadPool(const char* name, bool wanted = true,
                         [[maybe_unused]] const SignalsBlocked& until_it_is_made = {})
      : asio::thread_pool(wanted ? 1 : 0) {
    if (wanted) {
      asio::post(*this, [name] { name_this_thread(name); });
    }
  }
};

}  // namespace internal

class TransferChannelKit::Impl {
 public:
  explicit Impl(ChannelOptions given)
      : options(std::move(given)), incarnation(is_road() ? options.road_of->incarnation : random_incarnation()) {
    occupy_standard_descriptors();
    check_regions(options.regions);
    regions = std::make_shared<RegionTable>(options.regions);
    if (!options.advertised_init_url.empty()) {
      (void)parse_url(options.advertised_init_url);
    }
    if (!options.executor) {
      threads.emplace(options.io_threads, options.poll);
      executor = threads->executor();
    } else {
      executor = *options.executor;
    }
    deadlines = std::make_shared<DeadlineQueue>(executor);
    operations = std::make_shared<OperationRegistry>(deadlines, options.max_pending_operations, logger);
    exchanges = std::make_shared<InitExchanges>(deadlines);
    notifications = std::make_shared<NotificationQueue>(
        deadlines, NotificationQueue::Bounds{options.max_pending_notifications, options.max_pending_notification_bytes,
                                             options.max_pending_notification_bytes_of_peer,
                                             options.max_pending_notifications_of_peer});
    events_of_peers = std::make_shared<PeerEvents>(deadlines, options.max_pending_peer_events);
  }

  /// A part of another channel, which has all but the connections themselves.
  [[nodiscard]] bool is_road() const noexcept { return options.road_of != nullptr; }

  void answer_side_message(TransferChannelKit& channel, const SideMessage& request, HandshakeService::Reply& reply) {
    Failure failure;
    try {
      reply(channel.handle_init_side_msg(request));
      return;
    } catch (...) {
      failure = failure_being_handled();
    }
    reply(encode_side_message(
        SideMessageError{static_cast<std::int64_t>(code_for_peer(failure.code)), std::move(failure.sentence)}));
  }

  /// Keeps what answers a message until messages are let through. @return whether there was room; nothing if messages are
  /// let through.
  [[nodiscard]] std::optional<bool> hold(const std::string& source, std::size_t bytes, bool is_init,
                                         std::function<void()>& answer) {
    const std::lock_guard lock(held_mutex);
    return holding ? std::optional((is_init ? held_handshakes : side_messages).push(source, bytes, answer))
                   : std::nullopt;
  }

  void let_messages_through() {
    {
      const std::lock_guard lock(held_mutex);
      holding = false;
    }
    while (const auto answer = held_handshakes.pop()) {
      answer();
    }
    asio::post(side_message_thread, [this] {
      while (const auto answer = side_messages.pop()) {
        answer();
      }
    });
  }

  void answer_next_side_message() {
    asio::post(side_message_thread, [this] {
      if (const auto answer = side_messages.pop()) {
        answer();
      }
    });
  }

  [[nodiscard]] bool answers_in_this_thread() { return side_message_thread.get_executor().running_in_this_thread(); }

  void join_side_messages() {
    if (!answers_in_this_thread()) {
      const std::lock_guard lock(join_mutex);
      side_message_thread.join();
    }
  }

  /// @return nothing if the exchange has ended already.
  std::shared_ptr<InitExchange> begin_exchange(InitRequest request, SideMessageCompletion completion) {
    request.timeout = request.timeout.value_or(options.handshake_timeout);
    std::string problem;
    try {
      const HostPort address = parse_url(request.peer_init_url);
      request.peer_init_url = address.to_url();
      problem = why_not_dialable(address);
    } catch (const TransferError& error) {
      problem = error.what();
    }
    const auto until = deadline_after(*request.timeout);
    auto exchange = exchanges->begin(std::move(request), std::move(completion), until);
    if (exchange && !problem.empty()) {
      exchange->finish({errc::invalid_url, std::move(problem)});
      return nullptr;
    }
    return exchange;
  }

  /// An exchange that has begun ends as any other does, whatever is thrown on its way: it must not outlive a call that
  /// throws, whose diagnostic it writes.
  template <class Work>
  static void go_on(const std::shared_ptr<InitExchange>& exchange, Work work) {
    try {
      work();
    } catch (...) {
      exchange->finish(failure_being_handled());
    }
  }

  void ask(const std::shared_ptr<InitExchange>& exchange, const std::string& url) {
    const InitRequest& asked = exchange->request();
    handshakes->ask(
        url, asked.side_message.value_or(SideMessage{}), exchange->deadline() + longer_than_the_call,
        [exchange](std::error_code ec, SideMessage answer, std::string diagnostic, const std::string&) {
          exchange->finish({ec, std::move(diagnostic)}, ec ? std::nullopt : std::optional(std::move(answer)));
        },
        asked.peer_id);
  }

  const ProcessOfOrigin origin;
  const ChannelOptions options;
  const std::uint64_t incarnation;
  const std::shared_ptr<Logger> logger =
      is_road() ? options.road_of->logger : std::make_shared<Logger>(options.log_sink, options.log_level);
  const std::shared_ptr<Refusals> refusals =
      is_road() ? options.road_of->refusals : std::make_shared<Refusals>(logger);
  std::optional<IoThreads> threads;
  asio::any_io_executor executor;
  std::shared_ptr<DeadlineQueue> deadlines;
  std::shared_ptr<OperationRegistry> operations;
  std::shared_ptr<RegionTable> regions;
  std::shared_ptr<RegionRemovals> removals;
  std::function<void(std::uint32_t)> forget_region;  ///< Of the transport's; null: it has nothing to forget.
  std::shared_ptr<InitExchanges> exchanges;
  std::shared_ptr<NotificationQueue> notifications;
  std::shared_ptr<PeerEvents> events_of_peers;
  const std::shared_ptr<EventDescriptors> events = std::make_shared<EventDescriptors>();
  std::shared_ptr<PeerDirectory> peers;
  std::string advertised;
  OneThreadPool side_message_thread{"kvferry-side", !is_road()};
  std::mutex held_mutex;
  bool holding = options.hold_side_messages;
  const SideMessageQueue::Bounds side_message_bounds{options.max_pending_side_message_bytes,
                                                     options.max_pending_side_message_bytes_of_source};
  SideMessageQueue side_messages{side_message_bounds};
  SideMessageQueue held_handshakes{side_message_bounds};
  std::mutex join_mutex;
  std::optional<HandshakeService> handshakes;
  std::atomic<bool> closed{false};
  bool road_open = false;  ///< `start` has been called, of a road.
  std::once_flag close_once;
};

KVFERRY_INLINE TransferChannelKit::TransferChannelKit(ChannelOptions options) {
  try {
    impl_ = std::make_shared<Impl>(std::move(options));
  } catch (const TransferError&) {
    throw;
  } catch (const std::system_error& error) {
    // Asio has a category of its own for errno values.
    const bool is_errno = error.code().category() == asio::error::get_system_category();
    throw TransferError(is_errno ? std::error_code(error.code().value(), std::system_category()) : error.code(),
                        "the channel's threads");
  }
}

KVFERRY_INLINE TransferChannelKit::~TransferChannelKit() {
  if (inherited()) {
    keep_inherited(std::move(impl_));
    return;
  }
  const bool on_own_thread = (impl_->threads && running_in_io_thread()) || impl_->answers_in_this_thread();
  TransferChannelKit::close();
  run_handlers_left();
  impl_->handshakes.reset();
  if (on_own_thread) {
    // A handler has called exit, and the channel is a static object. What this thread runs on stays where it is.
    keep_inherited(std::move(impl_));
  }
}

KVFERRY_INLINE bool TransferChannelKit::inherited() const noexcept { return impl_->origin.was_forked(); }

KVFERRY_INLINE void TransferChannelKit::keep_inherited(std::shared_ptr<void> parts) {
  kvferry::keep_inherited(std::move(parts));
}

KVFERRY_INLINE void TransferChannelKit::run_handlers_left() {
  if (inherited()) {
    return;
  }
  if (impl_->handshakes) {
    impl_->handshakes->close();  // what was asked of it meanwhile has ended, too
  }
  if (impl_->threads && !running_in_io_thread()) {
    impl_->threads->finish();
  }
}

KVFERRY_INLINE void TransferChannelKit::start() {
  if (impl_->options.checksums && !capabilities().checksums) {
    throw TransferError(errc::not_supported, "ChannelOptions::checksums is set, and the transport '" +
                                                 std::string(transport()) + "' has no checksums");
  }
  if (impl_->options.keyring && impl_->options.zmq_context != nullptr) {
    throw TransferError(
        std::make_error_code(std::errc::invalid_argument),
        "ChannelOptions::keyring and zmq_context are both set; a channel with keys has a context of its own");
  }
  if (impl_->is_road()) {
    impl_->road_open = true;
    return;
  }
  if (impl_->options.require_encryption && leaves_host_in_the_clear()) {
    throw TransferError(std::make_error_code(std::errc::invalid_argument),
                        "ChannelOptions::require_encryption is set, and the transport '" + std::string(transport()) +
                            "' would move pages off this host unencrypted");
  }
  impl_->logger->set_transport(transport());
  impl_->forget_region = region_forgetter();
  impl_->removals = std::make_shared<RegionRemovals>(impl_->regions, impl_->operations, impl_->deadlines,
                                                     impl_->executor, impl_->forget_region);
  impl_->peers = std::make_shared<PeerDirectory>(
      impl_->options, impl_->regions, impl_->incarnation,
      TransportHooks{
          std::string(transport()), capabilities().region_changes,
          [this](const std::string& peer_id) { return dial(peer_id); },
          [this](std::shared_ptr<LinkHost> host, const Bytes& endpoint, Clock::time_point deadline,
                 LinkHandler on_link) { return accept(std::move(host), endpoint, deadline, std::move(on_link)); },
          [this](const std::string& source, std::size_t bytes, std::function<void()> answer) {
            return run_accept(source, bytes, std::move(answer));
          }},
      impl_->deadlines, impl_->notifications, impl_->events_of_peers, impl_->operations, impl_->logger);
  const auto awaited = [peers = std::weak_ptr(impl_->peers)](std::string_view peer_id) {
    const auto directory = peers.lock();
    return directory ? directory->awaited(peer_id) : std::string();
  };
  impl_->operations->set_awaited(awaited);
  impl_->exchanges->set_awaited(awaited);
  impl_->handshakes.emplace(
      HandshakeService::Options{impl_->options.peer_init_url, impl_->options.zmq_context,
                                impl_->options.max_handshake_bytes, impl_->refusals, impl_->options.handshake_timeout,
                                impl_->options.keyring},
      [this](SideMessage request, HandshakeService::Reply reply) {
        // Shared, because what is kept or posted has to be copyable.
        const auto shared_reply = std::make_shared<HandshakeService::Reply>(std::move(reply));
        const std::string source = shared_reply->source();
        const std::size_t bytes = request.encoded().size();
        const bool is_init = request.is<InitQuestion>();
        if (is_greeting(request)) {
          // Part of a handshake, which waits for nobody's side messages.
          (*shared_reply)(encode_side_message(GreetingAnswer{"ok", protocol_version}));
          return;
        }
        const auto turn_away = [refusals = impl_->refusals, shared_reply, source](const std::string& why) {
          refusals->count(errc::resource_limit, source, why);
          (*shared_reply)(encode_side_message(SideMessageError{static_cast<std::int64_t>(errc::resource_limit), why}));
        };
        std::function<void()> answer;
        if (is_init) {
          answer = [this, request = std::move(request), shared_reply, source, bytes, turn_away] {
            const bool taken = run_accept(source, bytes, [peers = impl_->peers, request, shared_reply] {
              try {
                peers->answer(request, std::move(*shared_reply));
              } catch (...) {
                // The reply is gone without having been made, so the peer has heard that the handshake failed.
              }
            });
            if (!taken) {
              turn_away("too many handshakes wait here, from there or in all");
            }
          };
        } else {
          answer = [this, request = std::move(request), shared_reply] {
            try {
              impl_->answer_side_message(*this, request, *shared_reply);
            } catch (...) {
              detail::log_exception("answering a side message");
            }
          };
        }
        // A subclass may be in its constructor still: no virtual function of its before it says so.
        const auto taken = impl_->hold(source, bytes, is_init, answer);
        if (!taken && is_init) {
          answer();
        } else if (!taken.value_or(false) && (taken || !impl_->side_messages.push(source, bytes, answer))) {
          turn_away("too many messages wait here, from there or in all");
        } else if (!taken) {
          impl_->answer_next_side_message();
        }
      });
  impl_->advertised = advertised_url(impl_->options, impl_->handshakes->bound_url());
  impl_->peers->use(*impl_->handshakes, url_for_others(impl_->advertised));
  impl_->logger->log(LogLevel::info, "channel_opened", {}, {}, [&] {
    return "incarnation " + std::to_string(impl_->incarnation) +
           (impl_->advertised.empty() ? ", answers no handshakes" : ", answers handshakes at " + impl_->advertised);
  });
}

KVFERRY_INLINE asio::any_io_executor TransferChannelKit::get_executor() const {
  return inherited() ? executor_of_forked_child() : impl_->executor;
}

KVFERRY_INLINE std::vector<LocalRegion> TransferChannelKit::regions() const {
  // In a forked child another thread of the parent's may hold the table's mutex for ever.
  return inherited() ? RegionList::of(impl_->options.regions)->all() : impl_->regions->now()->all();
}

KVFERRY_INLINE std::string TransferChannelKit::peer_init_url() const { return impl_->advertised; }

KVFERRY_INLINE std::optional<PeerInfo> TransferChannelKit::peer_info(std::string_view peer_id) const {
  return inherited() ? std::nullopt : impl_->peers->info(peer_id);
}

KVFERRY_INLINE std::vector<PeerInfo> TransferChannelKit::peers() const {
  return inherited() ? std::vector<PeerInfo>() : impl_->peers->infos();
}

KVFERRY_INLINE std::vector<std::byte> TransferChannelKit::local_metadata(std::string_view local_id) const {
  if (inherited()) {
    std::string why;
    say_forked(&why);
    throw TransferError(errc::forked, why);
  }
  return write_metadata(transport(), local_id, impl_->incarnation, url_for_others(impl_->advertised));
}

KVFERRY_INLINE bool TransferChannelKit::remote_xfer_handler_exists(std::string_view peer_id) const {
  return !inherited() && impl_->peers->usable(peer_id);
}

KVFERRY_INLINE ChannelStats TransferChannelKit::stats() const {
  ChannelStats stats = BaseTransferChannel::stats();
  if (inherited() || impl_->is_road()) {
    return stats;
  }
  stats.connected_peers = impl_->peers->usable_count();
  stats.identity_conflicts = impl_->peers->identity_conflicts();
  stats.peer_replacements = impl_->peers->peer_replacements();
  stats.checksum_mismatches = impl_->operations->counters().checksum_mismatches();
  stats.handshakes = impl_->peers->handshakes();
  stats.refused_strangers = impl_->refusals->snapshot();
  stats.peers = impl_->peers->peers();
  stats.pending_notifications = impl_->notifications->pending();
  stats.transfers = impl_->operations->counters().snapshot();
  return stats;
}

KVFERRY_INLINE const ChannelOptions& TransferChannelKit::options() const noexcept { return impl_->options; }

KVFERRY_INLINE std::shared_ptr<Poller> TransferChannelKit::poller() const {
  if (impl_->is_road()) {
    return impl_->options.road_of->poller;
  }
  return impl_->threads ? impl_->threads->poller() : nullptr;
}

KVFERRY_INLINE std::shared_ptr<Logger> TransferChannelKit::logger() const { return impl_->logger; }

KVFERRY_INLINE std::shared_ptr<Refusals> TransferChannelKit::refusals() const { return impl_->refusals; }

KVFERRY_INLINE std::uint64_t TransferChannelKit::incarnation() const noexcept { return impl_->incarnation; }

KVFERRY_INLINE bool TransferChannelKit::running_in_io_thread() const noexcept {
  if (inherited()) {
    return false;  // the call ends at once
  }
  const auto* executor = impl_->executor.target<asio::io_context::executor_type>();
  return executor != nullptr && executor->running_in_this_thread();
}

KVFERRY_INLINE SideMessage TransferChannelKit::handle_init_side_msg(const SideMessage& message) {
  if (message.is<PySocketInitRequest>()) {
    (void)decode_side_message<PySocketInitRequest>(message);  // throws for a field that is missing or of another kind
    return encode_side_message(PySocketInitResponse{"ok"});
  }
  if (message.is<P2PInitSideMsg>()) {
    return encode_side_message(P2PInitSideRetMsg{impl_->options.peer_lookup_url});
  }
  return BaseTransferChannel::handle_init_side_msg(message);
}

KVFERRY_INLINE void TransferChannelKit::start_transfer(TransferRequest request, Completion completion) {
  if (inherited()) {
    std::ranges::fill(request.statuses, make_error_code(errc::forked));
    say_forked(request.diagnostic);
    completion(errc::forked, 0);
    return;
  }
  const auto deadline = deadline_after(request.timeout.value_or(impl_->options.default_timeout));
  request.checksums = request.checksums.value_or(impl_->options.checksums);
  auto operation = std::make_shared<Operation>(std::move(request), std::move(completion), deadline, impl_->operations);
  if (impl_->closed) {
    operation->finish(errc::closed);
    return;
  }
  if (Failure failure = check_request(operation->request(), capabilities())) {
    operation->finish(failure.code, std::move(failure.sentence));
    return;
  }
  if (operation->object_count() == 0 && operation->request().notification.empty()) {
    operation->finish({});
    return;
  }
  operation->accept_cancellation();  // while nobody else can end it
  if (const auto refused = impl_->operations->add(operation)) {
    operation->finish(refused);
    return;
  }
  if (operation->finished()) {
    impl_->operations->remove(*operation);  // cancelled before it was entered
    return;
  }
  if (deadline <= operation->started()) {
    operation->request_stop(errc::timed_out);
    return;
  }
  try {
    impl_->peers->route(operation);
  } catch (...) {
    Failure failure = failure_being_handled();
    operation->finish(failure.code, std::move(failure.sentence));
  }
}

KVFERRY_INLINE std::size_t TransferChannelKit::run_transfer(TransferRequest request, std::error_code& ec) {
  if (running_in_io_thread() || inherited()) {
    return BaseTransferChannel::run_transfer(std::move(request), ec);
  }
  const auto transfer = std::make_shared<BlockingTransfer>(impl_->events);
  {
    const Serving serving(impl_->peers->link(request.peer_id), request);
    start_transfer(std::move(request), Completion::direct([transfer](std::error_code cause, std::size_t transferred) {
                     transfer->complete(cause, transferred);
                   }));
    if (serving && !transfer->over()) {
      try {
        serving->serve(*transfer);
      } catch (const std::system_error&) {
        // No descriptor to sleep on beside the link's: the I/O threads move it, and this one sleeps until it has ended.
      }
    }
  }
  return transfer->wait(ec);
}

KVFERRY_INLINE void TransferChannelKit::start_init_peer(InitRequest request, SideMessageCompletion completion) {
  if (inherited()) {
    say_forked(request.diagnostic);
    completion(errc::forked, std::nullopt);
    return;
  }
  connect_to(std::move(request), 0, nullptr, std::move(completion));
}

KVFERRY_INLINE void TransferChannelKit::start_connect(ConnectRequest request, ConnectCompletion completion) {
  if (inherited()) {
    say_forked(request.diagnostic);
    completion(errc::forked, {});
    return;
  }
  if (impl_->closed) {
    completion(errc::closed, {});
    return;
  }
  Failure failure;
  const PeerMetadata metadata = read_metadata(request.metadata, transport(), failure);
  if (failure) {
    if (request.diagnostic != nullptr) {
      *request.diagnostic = std::move(failure.sentence);
    }
    completion(failure.code, {});
    return;
  }
  // What it says is an argument like any other from here on.
  const auto found = std::make_shared<PeerInfo>();
  auto connected = SideMessageCompletion::wrapping(
      std::move(completion), [found](ConnectCompletion& end, std::error_code ec, const std::optional<SideMessage>&) {
        end(ec, ec ? PeerInfo() : std::move(*found));
      });
  connect_to({std::move(request.local_id), metadata.id, metadata.init_url, {}, request.timeout, request.diagnostic},
             metadata.incarnation, found, std::move(connected));
}

KVFERRY_INLINE void TransferChannelKit::connect_to(InitRequest request, std::uint64_t incarnation,
                                                   std::shared_ptr<PeerInfo> found, SideMessageCompletion completion) {
  const auto exchange = impl_->begin_exchange(std::move(request), std::move(completion));
  if (!exchange) {
    return;
  }
  Impl::go_on(exchange, [&] {
    const InitRequest& asked = exchange->request();
    Failure wrong = check_id(asked.peer_id, "the peer's");
    if (!wrong) {
      wrong = check_id(asked.local_id, "the local");
    }
    if (wrong) {
      exchange->finish(wrong);
      return;
    }
    const auto connected = [this, exchange, incarnation, found = std::move(found)](const Failure& failure) {
      if (failure || exchange->ended()) {
        exchange->finish(failure);
        return;
      }
      const InitRequest& given = exchange->request();
      if (found) {
        exchange->finish(impl_->peers->acknowledge(given.peer_id, incarnation, *found));
        return;
      }
      impl_->peers->acknowledge(given.peer_id);
      if (given.side_message) {
        impl_->ask(exchange, impl_->peers->reached_url(given.peer_id, given.peer_init_url));
      } else {
        exchange->finish({});
      }
    };
    impl_->peers->connect(asked.local_id, asked.peer_id, asked.peer_init_url, incarnation,
                          {exchange->deadline(), connected, [exchange] { return exchange->ended(); }});
  });
}

KVFERRY_INLINE void TransferChannelKit::answer_side_messages() {
  if (!inherited()) {
    impl_->let_messages_through();
  }
}

KVFERRY_INLINE void TransferChannelKit::start_side_message(InitRequest request, SideMessageCompletion completion) {
  if (inherited()) {
    say_forked(request.diagnostic);
    completion(errc::forked, std::nullopt);
    return;
  }
  if (const auto exchange = impl_->begin_exchange(std::move(request), std::move(completion))) {
    Impl::go_on(exchange, [&] { impl_->ask(exchange, exchange->request().peer_init_url); });
  }
}

KVFERRY_INLINE void TransferChannelKit::start_receive_notification(std::optional<std::chrono::milliseconds> timeout,
                                                                   NotificationCompletion completion) {
  if (inherited()) {
    completion(errc::forked, {});
    return;
  }
  impl_->notifications->receive(timeout, std::move(completion));
}

KVFERRY_INLINE void TransferChannelKit::start_receive_notifications(NotificationsRequest request,
                                                                    NotificationsCompletion completion) {
  if (inherited()) {
    completion(errc::forked, {});
    return;
  }
  impl_->notifications->receive(request, std::move(completion));
}

KVFERRY_INLINE void TransferChannelKit::start_wait_peer_event(std::optional<std::chrono::milliseconds> timeout,
                                                              PeerEventCompletion completion) {
  if (inherited()) {
    completion(errc::forked, {});
    return;
  }
  impl_->events_of_peers->receive(timeout, std::move(completion));
}

KVFERRY_INLINE void TransferChannelKit::start_disconnect(std::string peer_id, DisconnectCompletion completion) {
  if (inherited()) {
    completion(errc::forked);
    return;
  }
  if (impl_->closed || peer_id.empty()) {
    completion(impl_->closed ? errc::closed : errc::empty_peer_id);
    return;
  }
  const auto call = std::make_shared<PlainCall>(std::move(completion), impl_->deadlines);
  call->accept_cancellation();
  impl_->peers->disconnect(peer_id, [call](std::error_code ec) { call->end(ec); });
}

KVFERRY_INLINE void TransferChannelKit::start_fence(std::string peer_id,
                                                    std::optional<std::chrono::milliseconds> timeout,
                                                    FenceCompletion completion) {
  if (inherited()) {
    completion(errc::forked);
    return;
  }
  if (impl_->closed || peer_id.empty()) {
    completion(impl_->closed ? errc::closed : errc::empty_peer_id);
    return;
  }
  const auto deadline = deadline_after(timeout.value_or(impl_->options.default_timeout));
  const auto fence = std::make_shared<Fence>(std::move(completion), deadline, impl_->deadlines);
  fence->accept_cancellation();
  impl_->peers->fence(peer_id, deadline,
                      [peers = std::weak_ptr(impl_->peers), peer_id, fence](std::error_code refused,
                                                                            const std::shared_ptr<Link>& link) {
                        if (refused || !link) {
                          fence->end(refused);
                          return;
                        }
                        fence->wait_for(*link, [peers, fenced = std::weak_ptr(link), peer_id] {
                          const auto directory = peers.lock();
                          const auto asked = fenced.lock();
                          if (directory && asked) {
                            directory->break_link(peer_id, *asked, errc::connection_lost,
                                                  "the peer did not answer a fence in time");
                          }
                        });
                      });
}

KVFERRY_INLINE std::uint32_t TransferChannelKit::run_add_region(const MemoryRegion& region) {
  if (inherited()) {
    std::string why;
    say_forked(&why);
    throw TransferError(errc::forked, why);
  }
  if (impl_->closed) {
    throw TransferError(errc::closed, "add_region: the channel is closed");
  }
  if (!capabilities().region_changes) {
    return BaseTransferChannel::run_add_region(region);
  }
  check_region(region, "the region");
  const std::uint32_t number = impl_->regions->add(
      region, [this](const LocalRegion& added) { register_region(added); },
      [this](const LocalRegion& added) {
        if (impl_->forget_region) {
          impl_->forget_region(added.number);
        }
      });
  impl_->peers->tell_of_regions();
  return number;
}

KVFERRY_INLINE void TransferChannelKit::start_remove_region(std::uint32_t number,
                                                            std::optional<std::chrono::milliseconds> timeout,
                                                            RemoveRegionCompletion completion) {
  if (inherited()) {
    completion(errc::forked);
    return;
  }
  if (impl_->closed) {
    completion(errc::closed);
    return;
  }
  if (!capabilities().region_changes) {
    BaseTransferChannel::start_remove_region(number, timeout, std::move(completion));
    return;
  }
  impl_->removals->remove(number, deadline_after(timeout.value_or(impl_->options.default_timeout)),
                          std::move(completion), impl_->peers);
}

KVFERRY_INLINE void TransferChannelKit::close() {
  if (inherited()) {
    return;
  }
  std::call_once(impl_->close_once, [this] {
    impl_->closed = true;
    // Asked to stop first, so that peers can deal with what was sent of them while links take their leave. What is left
    // then ends with its link.
    impl_->operations->close(errc::closed);
    if (impl_->peers) {
      impl_->peers->close();
    }
    if (impl_->peers || impl_->road_open) {
      stop_listening();
    }
    impl_->operations->wait_until_empty();
    impl_->exchanges->close();
    if (impl_->handshakes) {
      impl_->handshakes->close();
    }
    impl_->notifications->close();
    impl_->events_of_peers->close();
    impl_->side_message_thread.stop();
    impl_->deadlines->close();
    impl_->deadlines->gate()->close();
    if (!impl_->is_road()) {
      impl_->logger->log(LogLevel::info, "channel_closed", {}, {},
                         [&] { return "incarnation " + std::to_string(impl_->incarnation); });
    }
  });
  // Outside, because a handler that is waited for may be calling this as well.
  impl_->join_side_messages();
}

}  // namespace kvferry::kit
