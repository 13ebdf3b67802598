// SPDX-License-Identifier: Apache-2.0
#pragma once

// Calls of a channel's user: each checks what it was given, and hands it to the part that it is for.
#include <algorithm>
#include <exception>
#include <memory>
#include <new>
#include <utility>

#include <kvferry/detail/recycled.hpp>
#include <kvferry/kit/checks.hpp>
#include <kvferry/kit/transfer_channel_kit_impl-inl.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The service that a blocking call of this thread offers to its operation, on the way through `start_transfer`, which others may
/// have overridden. They may start others on the way, here or on another channel: the first one of this channel takes it.
class OfferedService {
 public:
  OfferedService(const TransferChannelKit& channel, Serving& serving) noexcept
      : channel_before_(std::exchange(channel_, &channel)), serving_before_(std::exchange(serving_, &serving)) {}
  OfferedService(const OfferedService&) = delete;
  OfferedService& operator=(const OfferedService&) = delete;
  ~OfferedService() {
    channel_ = channel_before_;
    serving_ = serving_before_;
  }

  [[nodiscard]] static Serving* take(const TransferChannelKit& channel) noexcept {
    return channel_ == &channel ? std::exchange(serving_, nullptr) : nullptr;
  }

 private:
  inline static thread_local constinit const TransferChannelKit* channel_ = nullptr;
  inline static thread_local constinit Serving* serving_ = nullptr;
  const TransferChannelKit* channel_before_;
  Serving* serving_before_;
};

KVFERRY_INLINE void TransferChannelKit::start_transfer(TransferRequest request, Completion completion) {
  Serving* const serving = OfferedService::take(*this);
  if (inherited()) {
    std::ranges::fill(request.statuses, make_error_code(errc::forked));
    say_forked(request.diagnostic);
    completion(errc::forked, 0);
    return;
  }
  const auto deadline = deadline_after(request.timeout.value_or(impl_->options.default_timeout));
  request.checksums = request.checksums.value_or(impl_->options.checksums);
  auto operation =
      kvferry::detail::make_recycled<Operation>(std::move(request), std::move(completion), deadline, impl_->operations);
  if (impl_->closed) {
    operation->finish(errc::closed);
    return;
  }
  try {
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
    impl_->peers->route(operation, serving);
  } catch (...) {
    Failure failure = failure_being_handled();
    operation->finish(failure.code, std::move(failure.sentence));
  }
}

KVFERRY_INLINE std::size_t TransferChannelKit::run_transfer(TransferRequest request, std::error_code& ec) {
  if (must_not_block() || inherited()) {
    return BaseTransferChannel::run_transfer(std::move(request), ec);
  }
  auto [completion, transfer] = Completion::shared<BlockingTransfer>(impl_->events);
  {
    Serving serving;
    {
      const OfferedService offered(*this, serving);
      start_transfer(std::move(request), std::move(completion));
    }
    if (serving && !transfer->over()) {
      try {
        serving->serve(*transfer);
      } catch (const std::exception&) {
        // No descriptor to sleep on beside the link's, or no memory: the I/O threads move it, and this one sleeps until it has ended.
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
  // From here on its content is an argument like any other.
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
      Impl::go_on(exchange, [&] {
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
      });
    };
    impl_->peers->connect(asked.local_id, asked.peer_id, asked.peer_init_url, incarnation,
                          {exchange->deadline(), connected, [exchange] { return exchange->ended(); }});
  });
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
  impl_->peers->fence(
      peer_id, deadline,
      [peers = std::weak_ptr(impl_->peers), peer_id, fence](std::error_code refused,
                                                            const std::shared_ptr<Link>& link) {
        if (refused || !link) {
          fence->end(refused);
          return;
        }
        try {
          fence->wait_for(*link, [peers, fenced = std::weak_ptr(link), peer_id] {
            const auto directory = peers.lock();
            const auto asked = fenced.lock();
            if (directory && asked) {
              directory->break_link(peer_id, *asked, errc::connection_lost, "the peer did not answer a fence in time");
            }
          });
        } catch (const std::bad_alloc&) {
          // The link has not been asked, and nobody calls this again.
          if (const auto directory = peers.lock()) {
            directory->break_link(peer_id, *link, errc::connection_lost, "there was no memory to ask it for a fence");
          }
          fence->end({});
        }
      },
      fence->answered());
}

KVFERRY_INLINE void TransferChannelKit::register_region(const LocalRegion& region) {
  refuse_dmabuf(region, transport());
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

}  // namespace kvferry::kit
