// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/handshake/handshake_questions.hpp>

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

#include <kvferry/detail/host_address.hpp>
#include <kvferry/detail/side_message_error.hpp>
#include <kvferry/detail/text.hpp>
#include <kvferry/kit/init_messages.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// Of what a peer says of an error, in bytes: whoever answers may be a stranger.
inline constexpr std::size_t longest_sentence = 100;
/// A question may be asked of whoever has one of these many keys: each takes a connection of its own.
inline constexpr std::size_t most_server_keys = 64;

KVFERRY_INLINE std::string no_answer_in_time(const Question& question) {
  const auto allowed = question.deadline > question.asked_at
                           ? std::chrono::ceil<std::chrono::milliseconds>(question.deadline - question.asked_at)
                           : std::chrono::milliseconds(0);
  return "no answer from " + question.url + " within " + std::to_string(allowed.count()) + " ms";
}

/// After half of it whoever only hangs up is taken to have another key.
inline constexpr std::chrono::steady_clock::duration longest_doubt = std::chrono::seconds(10);
/// A server with too many connections closes some, also of those that wait for their answers.
inline constexpr std::size_t most_repeats = 5;

/// A channel may get one of these twice: the second takes the first one's place.
KVFERRY_INLINE bool may_be_repeated(const SideMessage& question) {
  return question.is<Greeting>() || question.is<InitQuestion>();
}

}  // namespace internal

KVFERRY_INLINE void end_with_closed(const Question& question) noexcept {
  try {
    question.on_answer(errc::closed, {}, "question to " + question.url + " ended: the channel was closed", {});
  } catch (...) {
    kvferry::detail::log_exception("by who asked a question");
  }
}

KVFERRY_INLINE void HandshakeQuestions::start(Question&& question) {
  const auto number = next_number_++;
  const auto open = open_.try_emplace(number).first;  // if it throws, the question is still the caller's
  open->second.question = std::move(question);
  guarded(number, [&] { begin(open); });
}

template <class Work>
void HandshakeQuestions::guarded(std::uint64_t number, Work work) noexcept {
  const auto failed = [&](std::error_code ec, const char* what) {
    if (const auto open = open_.find(number); open != open_.end()) {
      end(open, ec, "question to " + open->second.question.url + " failed: " + what);
    }
  };
  try {
    work();
  } catch (const zmq::error_t& error) {
    failed(error_code_of(error), error.what());
  } catch (const std::system_error& error) {
    failed(error.code(), error.what());
  } catch (const std::bad_alloc& error) {
    failed(std::make_error_code(std::errc::not_enough_memory), error.what());
  } catch (const std::exception& error) {
    failed(errc::handshake_failed, error.what());
  }
}

KVFERRY_INLINE void HandshakeQuestions::begin(Iterator open) {
  const auto number = open->first;
  const auto& url = open->second.question.url;
  if (const auto size = open->second.question.message.encoded().size(); size > max_message_bytes_) {
    end(open, std::make_error_code(std::errc::message_size),
        "a message of " + std::to_string(size) + " bytes to " + url + ", at most " +
            std::to_string(max_message_bytes_) + " get through");
    return;
  }
  if (keyring_) {
    const std::string& peer_id = open->second.question.peer_id;
    auto& keys = open->second.server_keys;
    keys = keyring_->keys_of(peer_id);
    if (keys.empty() || keys.size() > most_server_keys) {
      end(open, errc::authentication_failed,
          "cannot connect to " + url + ": the keyring has " +
              (keys.empty() ? "no key" : std::to_string(keys.size()) + " keys") + " of " +
              (peer_id.empty() ? std::string("peers, of whom any may answer") : "peer " + in_quotes(peer_id)) +
              (keys.empty() ? "" : ", at most " + std::to_string(most_server_keys) + " are tried"));
      return;
    }
  }
  HostPort target;
  try {
    target = parse_url(url);
  } catch (const TransferError& error) {
    end(open, error.code(), error.what());
    return;
  }
  if (const auto why = why_not_dialable(target); !why.empty()) {
    end(open, errc::invalid_url, "cannot connect to " + url + ": " + why);
  } else if (open->second.question.deadline <= std::chrono::steady_clock::now()) {
    end(open, errc::timed_out, no_answer_in_time(open->second.question));
  } else if (address_of(target.host)) {
    connect(open, {&target, 1});
  } else {
    // ZeroMQ would look the name up itself, on the thread that all its sockets share.
    lookups_.look_up(target.host, open->second.question.deadline,
                     [number, port = target.port, mailbox = mailbox_](std::error_code ec,
                                                                      const std::vector<asio::ip::address>& addresses) {
                       ResolvedCommand resolved{number, ec, {}};
                       for (const auto& address : addresses) {
                         resolved.addresses.push_back({address.to_string(), port});
                       }
                       Command command = std::move(resolved);
                       if (const auto still = mailbox.lock()) {
                         still->post(command);
                       }
                     });
  }
}

KVFERRY_INLINE void HandshakeQuestions::resolved(ResolvedCommand&& command) {
  const auto open = open_.find(command.question);
  if (open == open_.end()) {
    return;
  }
  if (command.error) {
    end(open, command.error,
        "cannot resolve the host of " + open->second.question.url + ": " + command.error.message());
    return;
  }
  guarded(command.question, [&] { connect(open, command.addresses); });
}

KVFERRY_INLINE void HandshakeQuestions::connect(Iterator open, std::span<const HostPort> addresses) {
  try {
    const auto now = std::chrono::steady_clock::now();
    open->second.attempts.add(addresses, now, open->second.server_keys);
    advance(open->second, now);
  } catch (const zmq::error_t& error) {
    end(open, error_code_of(error), "cannot connect to " + open->second.question.url + ": " + error.what());
  }
}

KVFERRY_INLINE void HandshakeQuestions::advance(Open& open, TimePoint now) {
  open.attempts.advance(context_, slots_, largest_frame(max_message_bytes_), now, keyring_.get());
}

KVFERRY_INLINE void HandshakeQuestions::append_poll_items(std::vector<zmq_pollitem_t>& items) {
  polled_.clear();
  for (auto& [number, open] : open_) {
    for (const auto& candidate : open.attempts.candidates()) {
      items.push_back({candidate.socket.ref().handle(), 0, ZMQ_POLLIN, 0});
      items.push_back({candidate.monitor.ref().handle(), 0, ZMQ_POLLIN, 0});
      polled_.push_back(number);
    }
  }
}

KVFERRY_INLINE void HandshakeQuestions::serve(std::span<const zmq_pollitem_t> items) {
  for (std::size_t i = 0; i < polled_.size(); ++i) {
    const auto& socket = items[2 * i];
    const auto& monitor = items[2 * i + 1];
    if (socket.revents == 0 && monitor.revents == 0) {
      continue;
    }
    const auto open = open_.find(polled_[i]);
    if (open == open_.end()) {
      continue;
    }
    guarded(polled_[i], [&] { serve(open, socket, monitor); });
  }
}

KVFERRY_INLINE void HandshakeQuestions::serve(Iterator open, const zmq_pollitem_t& socket,
                                              const zmq_pollitem_t& monitor) {
  auto& attempts = open->second.attempts;
  const auto candidate = attempts.find(monitor.socket);
  if (candidate == attempts.candidates().end() || (socket.revents != 0 && receive(open))) {
    return;
  }
  std::uint32_t value = 0;
  const auto event = candidate->monitor.receive({}, &value);
  if (event) {
    judge(open->second, *candidate, *event, value);
  }
  const bool sent = open->second.sent;
  if (event == ZMQ_EVENT_HANDSHAKE_SUCCEEDED && !sent) {
    attempts.settle_on(candidate);
    open->second.sent = attempts.candidates().front().socket.send({}, open->second.question.message.encoded());
  } else if (event == ZMQ_EVENT_DISCONNECTED && sent && !receive(open)) {
    if (may_be_repeated(open->second.question.message) && open->second.repeats++ < most_repeats) {
      open->second.sent = false;
      const auto now = std::chrono::steady_clock::now();
      attempts.failed(attempts.candidates().begin(), now);
      advance(open->second, now);
      return;
    }
    end(open, errc::connection_lost,
        "connection to " + open->second.question.url + " was lost before an answer came to a message of " +
            std::to_string(open->second.question.message.encoded().size()) +
            " bytes: the peer may take none of this size (ChannelOptions::max_handshake_bytes); an answer of more "
            "than " +
            std::to_string(largest_frame(max_message_bytes_)) + " bytes is not received");
    // NOLINTNEXTLINE(misc-redundant-expression): two events
  } else if (!sent && (event == ZMQ_EVENT_CLOSED || event == ZMQ_EVENT_DISCONNECTED)) {
    const auto now = std::chrono::steady_clock::now();
    attempts.failed(candidate, now);
    if (const auto why = why_hopeless(open->second, now); !why.empty()) {
      end(open, errc::authentication_failed, why);
    } else {
      advance(open->second, now);
    }
  }
}

/// Notes what it says of this candidate. Another address or key may still be right.
KVFERRY_INLINE void HandshakeQuestions::judge(Open& open, HandshakeAttempts::Candidate& candidate, int event,
                                              std::uint32_t value) {
  using Verdict = HandshakeAttempts::Verdict;
  const auto& url = open.question.url;
  const auto refused = [&](std::string why) {
    candidate.verdict = Verdict::refused;
    candidate.judged = true;
    open.refusal = std::move(why);
  };
  // A server that has no room for now says so ahead of this side's first word, which ZeroMQ doesn't expect.
  constexpr std::uint32_t later = 300;
  if ((event == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH && value == later) ||
      (event == ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL && value == ZMQ_PROTOCOL_ERROR_ZMTP_UNEXPECTED_COMMAND)) {
    candidate.verdict = Verdict::none;
    candidate.judged = true;
    return;
  }
  if (event == ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL && value == ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH) {
    refused(keyring_ ? url + " doesn't secure its handshakes, which this channel's keyring asks for"
                     : url + " secures its handshakes, and this channel has no keyring");
  } else if (event == ZMQ_EVENT_HANDSHAKE_FAILED_AUTH) {
    refused(url + " doesn't know this channel's key " + (keyring_ ? keyring_->own().public_key : std::string()));
  } else if (keyring_ && !candidate.judged &&
             (event == ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL || event == ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL)) {
    // It has another key, or no room for now.
    candidate.verdict = Verdict::hung_up;
    candidate.judged = true;
  }
}

/// A server that only hangs up may have no room for now. When half of the time is over, it counts as one with another key.
KVFERRY_INLINE std::string HandshakeQuestions::why_hopeless(const Open& open, TimePoint now) const {
  using Verdict = HandshakeAttempts::Verdict;
  if (open.attempts.all(Verdict::refused)) {
    return open.refusal;
  }
  const Question& question = open.question;
  const TimePoint::duration allowed = question.deadline - question.asked_at;
  if (!open.attempts.all(Verdict::hung_up) || now - question.asked_at < std::min(allowed, longest_doubt) / 2) {
    return {};
  }
  return "who answers at " + question.url + " has none of the keys that the keyring has for " +
         (question.peer_id.empty() ? "its peers" : "peer " + in_quotes(question.peer_id)) +
         ", or doesn't secure its handshakes";
}

KVFERRY_INLINE bool HandshakeQuestions::receive(Iterator open) {
  const auto frames = open->second.attempts.candidates().front().socket.receive();
  if (frames.empty()) {
    return false;
  }
  const auto& url = open->second.question.url;
  if (frames.size() != 1) {
    end(open, errc::malformed_message, "answer from " + url + " is not a single frame");
    return true;
  }
  if (const auto size = frames.front().size(); size > max_message_bytes_) {
    end(open, std::make_error_code(std::errc::message_size),
        "answer of " + std::to_string(size) + " bytes from " + url + ", at most " + std::to_string(max_message_bytes_) +
            " are taken");
    return true;
  }
  std::string_view problem;
  auto message = detail::parse_frame(bytes_of(frames.front()), problem);
  if (!problem.empty()) {
    end(open, errc::malformed_message, "answer from " + url + " is no side message: " + std::string(problem));
    return true;
  }
  answer(open, std::move(message));
  return true;
}

KVFERRY_INLINE void HandshakeQuestions::answer(Iterator open, SideMessage message) {
  if (!message.is<SideMessageError>()) {
    end(open, {}, {}, std::move(message));
    return;
  }
  try {
    const auto error = decode_side_message<SideMessageError>(message);
    end(open, code_of(error), open->second.question.url + " answered: " + escaped(error.message, longest_sentence));
  } catch (const TransferError& error) {
    end(open, error.code(), "answer from " + open->second.question.url + ": " + error.what());
  }
}

KVFERRY_INLINE std::optional<HandshakeQuestions::TimePoint> HandshakeQuestions::next_deadline() const {
  std::optional<TimePoint> next;
  for (const auto& [number, open] : open_) {
    const TimePoint due = std::min(open.question.deadline, open.attempts.due());
    next = std::min(next.value_or(due), due);
  }
  return next;
}

KVFERRY_INLINE void HandshakeQuestions::expire(TimePoint now) {
  for (auto open = open_.begin(); open != open_.end();) {
    const auto candidate = open++;
    const Question& question = candidate->second.question;
    if (question.deadline > now) {
      guarded(candidate->first, [&] { advance(candidate->second, now); });
      continue;
    }
    auto diagnostic = no_answer_in_time(question);
    if (!candidate->second.sent) {
      diagnostic += candidate->second.attempts.begun() ? " (no connection was made)" : " (its host was not resolved)";
    }
    end(candidate, errc::timed_out, diagnostic);
    lookups_.start_waiting();
  }
}

KVFERRY_INLINE void HandshakeQuestions::close() {
  lookups_.close();
  auto ended = std::exchange(open_, {});
  for (auto& [number, open] : ended) {
    open.attempts.clear();
  }
  for (const auto& [number, open] : ended) {
    end_with_closed(open.question);
  }
}

KVFERRY_INLINE void HandshakeQuestions::end(Iterator open, std::error_code ec, const std::string& diagnostic,
                                            SideMessage message) noexcept {
  const auto on_answer = std::move(open->second.question.on_answer);
  std::string reached =
      open->second.sent ? std::move(open->second.attempts.candidates().front().address.host) : std::string();
  open_.erase(open);
  try {
    on_answer(ec, std::move(message), diagnostic, std::move(reached));
  } catch (...) {
    kvferry::detail::log_exception("by who asked a question");
  }
}

}  // namespace kvferry::kit
