// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/base_transfer_channel.hpp>

#include <algorithm>
#include <functional>
#include <memory>
#include <new>

#include <kvferry/kit/logger.hpp>

#include <kvferry/detail/blocking_call.hpp>
#include <kvferry/detail/recycled.hpp>
#include <kvferry/detail/text.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

template <class Buffer>
TransferRequest describe(TransferKind kind, const TransferSpec& spec, std::vector<Buffer>&& buffers) {
  TransferRequest request;
  request.kind = kind;
  request.peer_id = spec.peer_id;
  if constexpr (std::is_same_v<Buffer, MutableBuffer>) {
    request.objects = std::move(buffers);
  } else {
    request.objects = detail::take_spare_vector<MutableBuffer>();
    request.objects.reserve(buffers.size());
    for (const ConstBuffer buffer : buffers) {
      request.objects.emplace_back(const_cast<std::byte*>(buffer.data()), buffer.size());
    }
  }
  request.remote_indexes = detail::take_spare_vector<std::uint64_t>();
  request.remote_indexes.assign(spec.remote_indexes.begin(), spec.remote_indexes.end());
  request.remote_region = spec.remote_region;
  request.remote_ranges.assign(spec.remote_ranges.begin(), spec.remote_ranges.end());
  request.local_strides.assign(spec.local_strides.begin(), spec.local_strides.end());
  request.incarnation = spec.incarnation;
  request.tag = spec.tag;
  request.timeout = spec.timeout;
  request.notification.assign(spec.notification.begin(), spec.notification.end());
  request.notification_key = spec.notification_key;
  request.checksums = spec.checksums;
  request.statuses = spec.statuses;
  request.sizes = spec.sizes;
  request.diagnostic = spec.diagnostic;
  return request;
}

}  // namespace internal

KVFERRY_INLINE std::optional<SideMessage> BaseTransferChannel::lazy_init_peer_connection(
    std::string_view local_id, std::string_view peer_id, std::string_view peer_init_url,
    std::optional<SideMessage> side_message, const InitSpec& spec, std::error_code& ec) {
  ec.clear();
  if (must_not_block()) {
    ec = refuse_to_block(spec.diagnostic);
    return std::nullopt;
  }
  return wait_for<std::optional<SideMessage>>(
      [&](SideMessageCompletion completion) {
        start_init_peer(InitRequest{std::string(local_id), std::string(peer_id), std::string(peer_init_url),
                                    std::move(side_message), spec.timeout, spec.diagnostic},
                        std::move(completion));
      },
      ec);
}

KVFERRY_INLINE std::optional<SideMessage> BaseTransferChannel::lazy_init_peer_connection(
    std::string_view local_id, std::string_view peer_id, std::string_view peer_init_url,
    std::optional<SideMessage> side_message, const InitSpec& spec) {
  return or_throw(spec, "lazy_init_peer_connection", [&](const InitSpec& given, std::error_code& ec) {
    return lazy_init_peer_connection(local_id, peer_id, peer_init_url, std::move(side_message), given, ec);
  });
}

KVFERRY_INLINE ChannelStats BaseTransferChannel::stats() const {
  ChannelStats stats;
  stats.transport = transport();
  return stats;
}

KVFERRY_INLINE SideMessage BaseTransferChannel::handle_init_side_msg(const SideMessage& message) {
  throw TransferError(errc::unhandled_side_message, "no answer to a side message of type " + in_quotes(message.type()));
}

KVFERRY_INLINE SideMessage BaseTransferChannel::send_init_side_msg(std::string_view peer_init_url, SideMessage message,
                                                                   const InitSpec& spec, std::error_code& ec) {
  ec.clear();
  if (must_not_block()) {
    ec = refuse_to_block(spec.diagnostic);
    return {};
  }
  if (answers_in_this_thread(peer_init_url)) {
    ec = errc::would_deadlock;
    if (spec.diagnostic != nullptr) {
      *spec.diagnostic = "handle_init_side_msg waits for a message to its own channel, which only it could answer";
    }
    return {};
  }
  auto answer = wait_for<std::optional<SideMessage>>(
      [&](SideMessageCompletion completion) {
        start_side_message(
            InitRequest{{}, {}, std::string(peer_init_url), std::move(message), spec.timeout, spec.diagnostic},
            std::move(completion));
      },
      ec);
  return std::move(answer).value_or(SideMessage{});
}

KVFERRY_INLINE SideMessage BaseTransferChannel::send_init_side_msg(std::string_view peer_init_url, SideMessage message,
                                                                   const InitSpec& spec) {
  return or_throw(spec, "send_init_side_msg", [&](const InitSpec& given, std::error_code& ec) {
    return send_init_side_msg(peer_init_url, std::move(message), given, ec);
  });
}

KVFERRY_INLINE std::vector<std::uint64_t> BaseTransferChannel::get_local_mem_indices(const ConstObjects& objects,
                                                                                     std::uint32_t region) const {
  const auto all = regions();
  const LocalRegion* const found = find_region(all, region);
  if (found == nullptr) {
    throw TransferError(errc::unknown_region, "get_local_mem_indices: region " + std::to_string(region) +
                                                  " is none of the " + std::to_string(all.size()) + " that there are");
  }
  const MemoryRegion& memory = *found;
  const auto base = reinterpret_cast<std::uintptr_t>(memory.data);
  std::vector<std::uint64_t> indexes;
  indexes.reserve(objects.buffers().size());
  for (const ConstBuffer object : objects.buffers()) {
    const auto address = reinterpret_cast<std::uintptr_t>(object.data());
    const bool inside = address >= base && address - base < memory.size && (address - base) % memory.page_size == 0;
    if (!inside || object.size() > memory.page_size) {
      throw TransferError(errc::not_in_region, "get_local_mem_indices: object " + std::to_string(indexes.size()) +
                                                   " of " + std::to_string(object.size()) +
                                                   " bytes is no page of region " + std::to_string(region) +
                                                   ", whose " + std::to_string(memory.page_count()) + " pages have " +
                                                   std::to_string(memory.page_size) + " bytes");
    }
    indexes.push_back((address - base) / memory.page_size);
  }
  return indexes;
}

KVFERRY_INLINE TransferRequest BaseTransferChannel::make_request(TransferKind kind, ConstObjects objects,
                                                                 const TransferSpec& spec) {
  return describe(kind, spec, std::move(objects.buffers()));
}

KVFERRY_INLINE TransferRequest BaseTransferChannel::make_request(TransferKind kind, MutableObjects objects,
                                                                 const TransferSpec& spec) {
  return describe(kind, spec, std::move(objects.buffers()));
}

KVFERRY_INLINE std::size_t BaseTransferChannel::run_transfer(TransferRequest request, std::error_code& ec) {
  if (must_not_block()) {
    ec = refuse_to_block(request.diagnostic);
    std::ranges::fill(request.statuses, ec);
    return 0;
  }
  return wait_for<std::size_t>(
      [&](Completion completion) { start_transfer(std::move(request), std::move(completion)); }, ec);
}

KVFERRY_INLINE std::size_t BaseTransferChannel::transfer_or_throw(TransferRequest request) {
  std::string own;
  if (request.diagnostic == nullptr) {
    request.diagnostic = &own;
  }
  const std::string* diagnostic = request.diagnostic;
  const auto kind = request.kind;
  std::error_code ec;
  const std::size_t transferred = run_transfer(std::move(request), ec);
  if (ec) {
    throw TransferError(ec, sentence(*diagnostic, to_string(kind)), transferred);
  }
  return transferred;
}

KVFERRY_INLINE std::size_t BaseTransferChannel::batched_send(ConstObjects objects, const TransferSpec& spec) {
  return transfer_or_throw(make_request(TransferKind::send, std::move(objects), spec));
}

KVFERRY_INLINE std::size_t BaseTransferChannel::batched_send(ConstObjects objects, const TransferSpec& spec,
                                                             std::error_code& ec) {
  ec.clear();
  return run_transfer(make_request(TransferKind::send, std::move(objects), spec), ec);
}

KVFERRY_INLINE std::size_t BaseTransferChannel::batched_recv(MutableObjects objects, const TransferSpec& spec) {
  return transfer_or_throw(make_request(TransferKind::recv, std::move(objects), spec));
}

KVFERRY_INLINE std::size_t BaseTransferChannel::batched_recv(MutableObjects objects, const TransferSpec& spec,
                                                             std::error_code& ec) {
  ec.clear();
  return run_transfer(make_request(TransferKind::recv, std::move(objects), spec), ec);
}

KVFERRY_INLINE std::size_t BaseTransferChannel::batched_write(ConstObjects objects, const TransferSpec& spec) {
  return transfer_or_throw(make_request(TransferKind::write, std::move(objects), spec));
}

KVFERRY_INLINE std::size_t BaseTransferChannel::batched_write(ConstObjects objects, const TransferSpec& spec,
                                                              std::error_code& ec) {
  ec.clear();
  return run_transfer(make_request(TransferKind::write, std::move(objects), spec), ec);
}

KVFERRY_INLINE std::size_t BaseTransferChannel::batched_read(MutableObjects objects, const TransferSpec& spec) {
  return transfer_or_throw(make_request(TransferKind::read, std::move(objects), spec));
}

KVFERRY_INLINE std::size_t BaseTransferChannel::batched_read(MutableObjects objects, const TransferSpec& spec,
                                                             std::error_code& ec) {
  ec.clear();
  return run_transfer(make_request(TransferKind::read, std::move(objects), spec), ec);
}

KVFERRY_INLINE Notification BaseTransferChannel::receive_notification(std::optional<std::chrono::milliseconds> timeout,
                                                                      std::error_code& ec) {
  ec.clear();
  if (must_not_block()) {
    ec = refuse_to_block(nullptr);
    return {};
  }
  return wait_for<Notification>(
      [&](NotificationCompletion completion) { start_receive_notification(timeout, std::move(completion)); }, ec);
}

KVFERRY_INLINE Notification
BaseTransferChannel::receive_notification(std::optional<std::chrono::milliseconds> timeout) {
  std::error_code ec;
  Notification notification = receive_notification(timeout, ec);
  if (ec) {
    throw TransferError(ec, "receive_notification");
  }
  return notification;
}

KVFERRY_INLINE std::vector<Notification> BaseTransferChannel::receive_notifications(
    std::uint64_t key, std::size_t count, std::optional<std::chrono::milliseconds> timeout, std::error_code& ec) {
  ec.clear();
  if (must_not_block()) {
    ec = refuse_to_block(nullptr);
    return {};
  }
  return wait_for<std::vector<Notification>>(
      [&](NotificationsCompletion completion) {
        start_receive_notifications({key, count, timeout}, std::move(completion));
      },
      ec);
}

KVFERRY_INLINE std::vector<Notification> BaseTransferChannel::receive_notifications(
    std::uint64_t key, std::size_t count, std::optional<std::chrono::milliseconds> timeout) {
  std::error_code ec;
  auto notifications = receive_notifications(key, count, timeout, ec);
  if (ec && ec != errc::timed_out) {
    throw TransferError(ec, "receive_notifications of key " + std::to_string(key));
  }
  return notifications;
}

KVFERRY_INLINE TransferRequest BaseTransferChannel::make_notification(std::string_view peer_id, ConstBuffer payload,
                                                                      const NotifySpec& spec) {
  TransferRequest request;
  request.kind = TransferKind::write;
  request.peer_id = peer_id;
  request.timeout = spec.timeout;
  request.notification.assign(payload.begin(), payload.end());
  request.notification_key = spec.key;
  request.diagnostic = spec.diagnostic;
  return request;
}

/// @return the error that a notification without a byte ends with, and why.
KVFERRY_INLINE std::error_code refuse_empty_notification(const TransferRequest& request) {
  if (!request.notification.empty()) {
    return {};
  }
  if (request.diagnostic != nullptr) {
    *request.diagnostic = "a notification has at least one byte";
  }
  return std::make_error_code(std::errc::invalid_argument);
}

KVFERRY_INLINE void BaseTransferChannel::start_notify(TransferRequest request, NotifyCompletion completion) {
  auto ended = Completion::wrapping(std::move(completion),
                                    [](NotifyCompletion& end, std::error_code ec, std::size_t) { end(ec); });
  if (const auto ec = refuse_empty_notification(request)) {
    ended(ec, 0);
    return;
  }
  start_transfer(std::move(request), std::move(ended));
}

KVFERRY_INLINE void BaseTransferChannel::notify(std::string_view peer_id, ConstBuffer payload, const NotifySpec& spec,
                                                std::error_code& ec) {
  if (must_not_block()) {
    ec = refuse_to_block(spec.diagnostic);
    return;
  }
  auto request = make_notification(peer_id, payload, spec);
  ec = refuse_empty_notification(request);
  if (!ec) {
    run_transfer(std::move(request), ec);
  }
}

KVFERRY_INLINE void BaseTransferChannel::notify(std::string_view peer_id, ConstBuffer payload, const NotifySpec& spec) {
  or_throw(spec, "notify", [&](const NotifySpec& given, std::error_code& ec) { notify(peer_id, payload, given, ec); });
}

KVFERRY_INLINE PeerInfo BaseTransferChannel::connect(std::string_view local_id, ConstBuffer metadata,
                                                     const InitSpec& spec, std::error_code& ec) {
  ec.clear();
  if (must_not_block()) {
    ec = refuse_to_block(spec.diagnostic);
    return {};
  }
  return wait_for<PeerInfo>(
      [&](ConnectCompletion completion) {
        start_connect({std::string(local_id), {metadata.begin(), metadata.end()}, spec.timeout, spec.diagnostic},
                      std::move(completion));
      },
      ec);
}

KVFERRY_INLINE PeerInfo BaseTransferChannel::connect(std::string_view local_id, ConstBuffer metadata,
                                                     const InitSpec& spec) {
  return or_throw(spec, "connect",
                  [&](const InitSpec& given, std::error_code& ec) { return connect(local_id, metadata, given, ec); });
}

KVFERRY_INLINE void BaseTransferChannel::disconnect(std::string_view peer_id, std::error_code& ec) {
  ec.clear();
  if (must_not_block()) {
    ec = refuse_to_block(nullptr);
    return;
  }
  wait_for_end([&](DisconnectCompletion completion) { start_disconnect(std::string(peer_id), std::move(completion)); },
               ec);
}

KVFERRY_INLINE void BaseTransferChannel::disconnect(std::string_view peer_id) {
  std::error_code ec;
  disconnect(peer_id, ec);
  if (ec) {
    throw TransferError(ec, "disconnect of peer " + in_quotes(peer_id));
  }
}

KVFERRY_INLINE PeerEvent BaseTransferChannel::wait_peer_event(std::optional<std::chrono::milliseconds> timeout,
                                                              std::error_code& ec) {
  ec.clear();
  if (must_not_block()) {
    ec = refuse_to_block(nullptr);
    return {};
  }
  return wait_for<PeerEvent>(
      [&](PeerEventCompletion completion) { start_wait_peer_event(timeout, std::move(completion)); }, ec);
}

KVFERRY_INLINE PeerEvent BaseTransferChannel::wait_peer_event(std::optional<std::chrono::milliseconds> timeout) {
  std::error_code ec;
  PeerEvent event = wait_peer_event(timeout, ec);
  if (ec) {
    throw TransferError(ec, "wait_peer_event");
  }
  return event;
}

KVFERRY_INLINE void BaseTransferChannel::fence(std::string_view peer_id,
                                               std::optional<std::chrono::milliseconds> timeout, std::error_code& ec) {
  ec.clear();
  if (must_not_block()) {
    ec = refuse_to_block(nullptr);
    return;
  }
  wait_for_end([&](FenceCompletion completion) { start_fence(std::string(peer_id), timeout, std::move(completion)); },
               ec);
}

KVFERRY_INLINE void BaseTransferChannel::fence(std::string_view peer_id,
                                               std::optional<std::chrono::milliseconds> timeout) {
  std::error_code ec;
  fence(peer_id, timeout, ec);
  if (ec) {
    throw TransferError(ec, "fence of peer '" + std::string(peer_id) + "'");
  }
}

KVFERRY_INLINE bool BaseTransferChannel::must_not_block() const noexcept {
  return kit::in_log_sink() || running_in_io_thread();
}

KVFERRY_INLINE std::uint32_t BaseTransferChannel::add_region(const MemoryRegion& region) {
  kit::refuse_in_log_sink("add_region()");
  return run_add_region(region);
}

KVFERRY_INLINE std::uint32_t BaseTransferChannel::add_region(const MemoryRegion& region, std::error_code& ec) {
  ec.clear();
  try {
    return add_region(region);
  } catch (const std::system_error& error) {
    ec = error.code();
  } catch (const std::bad_alloc&) {
    ec = std::make_error_code(std::errc::not_enough_memory);
  }
  return 0;
}

KVFERRY_INLINE void BaseTransferChannel::remove_region(std::uint32_t number,
                                                       std::optional<std::chrono::milliseconds> timeout,
                                                       std::error_code& ec) {
  ec.clear();
  if (must_not_block()) {
    ec = refuse_to_block(nullptr);
    return;
  }
  wait_for_end([&](RemoveRegionCompletion completion) { start_remove_region(number, timeout, std::move(completion)); },
               ec);
}

KVFERRY_INLINE void BaseTransferChannel::remove_region(std::uint32_t number,
                                                       std::optional<std::chrono::milliseconds> timeout) {
  std::error_code ec;
  remove_region(number, timeout, ec);
  if (ec) {
    throw TransferError(ec, "remove_region of region " + std::to_string(number));
  }
}

KVFERRY_INLINE std::uint32_t BaseTransferChannel::run_add_region(const MemoryRegion&) {
  throw TransferError(errc::not_supported,
                      "the transport '" + std::string(transport()) + "' adds no regions to a channel that there is");
}

KVFERRY_INLINE void BaseTransferChannel::start_remove_region(std::uint32_t, std::optional<std::chrono::milliseconds>,
                                                             RemoveRegionCompletion completion) {
  completion(errc::not_supported);
}

}  // namespace kvferry
