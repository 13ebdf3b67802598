// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/transfer_channel_kit_impl-inl.hpp>

#include <kvferry/detail/known_executor.hpp>
#include <kvferry/detail/side_message_error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

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
  if (in_log_sink()) {
    tell_of_call_in_log_sink("the destructor of a channel");
    std::terminate();
  }
  const bool on_own_thread = impl_->runs_this_thread() || impl_->answers_in_this_thread();
  shut();
  run_handlers_left();
  impl_->handshakes.reset();
  if (on_own_thread) {
    // A handler has called exit, and the channel is a static object. The memory that this thread runs on stays where it is.
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
  if (impl_->threads && !impl_->runs_this_thread()) {
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
  const auto stopped_waiting = [peers = std::weak_ptr(impl_->peers)](std::string_view peer_id) {
    if (const auto directory = peers.lock()) {
      directory->stopped_waiting(peer_id);
    }
  };
  impl_->operations->set_stopped_waiting(stopped_waiting);
  impl_->exchanges->set_stopped_waiting(stopped_waiting);
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
          (*shared_reply)(refusal(errc::resource_limit, why));
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
  impl_->opened = true;
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
  return impl_->runs_this_thread() || (!impl_->threads && kvferry::detail::runs_in_this_thread(impl_->executor));
}

KVFERRY_INLINE bool TransferChannelKit::answers_in_this_thread(std::string_view url) const {
  return !inherited() && impl_->answers_in_this_thread() && impl_->leads_here(url);
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

KVFERRY_INLINE void TransferChannelKit::answer_side_messages() {
  if (!inherited()) {
    impl_->let_messages_through();
  }
}

KVFERRY_INLINE void TransferChannelKit::close() {
  if (inherited()) {
    return;
  }
  refuse_in_log_sink("close()");
  shut();
}

KVFERRY_INLINE void TransferChannelKit::shut() {
  std::call_once(impl_->close_once, [this] {
    impl_->closed = true;
    // Operations are asked to stop first, so that peers can deal with the bytes that were sent while links take their leave. The
    // operations that are left then end with their links.
    impl_->operations->close(errc::closed);
    if (impl_->peers) {
      impl_->peers->close();
    }
    if (impl_->peers || impl_->road_open) {
      stop_listening();
    }
    impl_->operations->wait_until_empty();
    if (impl_->removals) {
      impl_->removals->close();
    }
    impl_->exchanges->close();
    if (impl_->handshakes) {
      impl_->handshakes->close();
    }
    impl_->notifications->close();
    impl_->events_of_peers->close();
    impl_->side_message_thread.stop();
    impl_->deadlines->close();
    impl_->deadlines->gate()->close();
    if (impl_->opened) {
      impl_->logger->log(LogLevel::info, "channel_closed", {}, {},
                         [&] { return "incarnation " + std::to_string(impl_->incarnation); });
    }
  });
  // Outside, because a handler that is waited for may be calling this as well.
  impl_->join_side_messages();
}

}  // namespace kvferry::kit
