// SPDX-License-Identifier: Apache-2.0
#pragma once

// The parts of a channel.
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
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/kit/handshake_service.hpp>
#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include <kvferry/detail/host_address.hpp>
#include <kvferry/detail/process.hpp>
#include <kvferry/detail/side_message_error.hpp>
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
#include <kvferry/kit/serving.hpp>
#include <kvferry/kit/side_message_queue.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

KVFERRY_INLINE std::uint64_t random_incarnation() {
  std::random_device device;
  const std::uint64_t high = device();
  // Never 0, which stands for "none".
  return (high << 32 | device()) | 1;
}

/// @throws TransferError if peers couldn't connect to what they are told.
KVFERRY_INLINE void check_advertised_url(const std::string& url) {
  if (url.empty()) {
    return;
  }
  const auto refuse = [&](const std::string& reason) {
    throw TransferError(errc::invalid_url, "ChannelOptions::advertised_init_url: " + reason);
  };
  HostPort told;
  try {
    told = parse_url(url);
  } catch (const TransferError& error) {
    refuse(error.what());
  }
  if (told.is_wildcard()) {
    refuse("\"" + url + "\" is a wildcard, to which no peer can connect; advertise an address or name of this host");
  }
  if (is_group(told.host)) {
    refuse("\"" + url + "\" is the address of a group, at which nobody accepts connections");
  }
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

/// More than any machine has cores to run them: a number that is wrong shall not take all threads that a system has.
inline constexpr std::size_t max_io_threads = 1024;

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
    check_advertised_url(options.advertised_init_url);
    if (!options.executor) {
      if (options.io_threads > max_io_threads) {
        throw TransferError(std::make_error_code(std::errc::invalid_argument),
                            "ChannelOptions::io_threads is " + std::to_string(options.io_threads) + ", at most " +
                                std::to_string(max_io_threads));
      }
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
    reply(refusal(code_for_peer(failure.code), failure.sentence));
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

  /// Whether this is one of the channel's own I/O threads.
  [[nodiscard]] bool runs_this_thread() { return threads && threads->run_this_one(); }
  [[nodiscard]] bool answers_in_this_thread() { return side_message_thread.get_executor().running_in_this_thread(); }

  /// Whether a url is certain to be this channel's own. Several may share one that the program advertises.
  [[nodiscard]] bool leads_here(std::string_view url) const {
    std::error_code ec;
    const HostPort target = parse_url(url, ec);
    if (ec || !handshakes || handshakes->bound_url().empty()) {
      return false;
    }
    const HostPort bound = parse_url(handshakes->bound_url());
    const auto address = address_of(target.host);
    const bool within_host = target.host == "localhost" || (address && address->is_loopback());
    return (options.advertised_init_url.empty() && target == parse_url(advertised)) ||
           (target.port == bound.port && (target.host == bound.host || (bound.is_wildcard() && within_host)));
  }

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
          if (ec == errc::timed_out && Clock::now() >= exchange->deadline()) {
            exchange->expire();  // which it would do itself by now, on a machine with less to do
          } else {
            exchange->finish({ec, std::move(diagnostic)}, ec ? std::nullopt : std::optional(std::move(answer)));
          }
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
  std::atomic<bool> opened{false};  ///< What was logged as opened is logged as closed.
  bool road_open = false;  ///< `start` has been called, of a road.
  std::once_flag close_once;
};

}  // namespace kvferry::kit
