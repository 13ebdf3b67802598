// SPDX-License-Identifier: Apache-2.0
#include "handshake_questions.hpp"

#include <algorithm>
#include <iterator>
#include <new>
#include <utility>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

#include "host_address.hpp"
#include "side_message_error.hpp"
#include "text.hpp"

namespace kvferry::kit {
namespace {

/// A name may have many addresses; the first to accept a connection gets the question.
constexpr std::size_t max_addresses = 8;
/// Before the next address is tried, beside those that have not answered (RFC 8305, section 5).
constexpr std::chrono::milliseconds attempt_delay{250};
/// Of what a peer says of an error.
constexpr std::size_t longest_sentence = 100;
constexpr int reconnect_interval_ms = 20;
constexpr int longest_reconnect_interval_ms = 500;
/// The kernel waits for minutes, with growing pauses, for a host that does not respond.
constexpr int connect_timeout_ms = 2000;

std::string no_answer_in_time(const Question& question) {
  const auto allowed = question.deadline > question.asked_at
                           ? std::chrono::ceil<std::chrono::milliseconds>(question.deadline - question.asked_at)
                           : std::chrono::milliseconds(0);
  return "no answer from " + question.url + " within " + std::to_string(allowed.count()) + " ms";
}

}  // namespace

void end_with_closed(const Question& question) noexcept {
  try {
    question.on_answer(errc::closed, {}, "question to " + question.url + " ended: the channel was closed", {});
  } catch (...) {
    kvferry::detail::log_exception("by who asked a question");
  }
}

void HandshakeQuestions::start(Question&& question) {
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

void HandshakeQuestions::begin(Iterator open) {
  const auto number = open->first;
  const auto& url = open->second.question.url;
  if (const auto size = open->second.question.message.encoded().size(); size > max_message_bytes_) {
    end(open, std::make_error_code(std::errc::message_size),
        "a message of " + std::to_string(size) + " bytes to " + url + ", at most " +
            std::to_string(max_message_bytes_) + " get through");
    return;
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
                     [number, port = target.port, mailbox = mailbox_](
                         std::error_code ec, const std::vector<asio::ip::address>& addresses) {
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

void HandshakeQuestions::resolved(ResolvedCommand&& command) {
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

void HandshakeQuestions::connect(Iterator open, std::span<const HostPort> addresses) {
  try {
    const auto tried = addresses.first(std::min(addresses.size(), max_addresses));
    open->second.untried.assign(tried.rbegin(), tried.rend());
    try_next(open->second);
  } catch (const zmq::error_t& error) {
    end(open, error_code_of(error), "cannot connect to " + open->second.question.url + ": " + error.what());
  }
}

void HandshakeQuestions::try_next(Open& open) const {
  const HostPort address = open.untried.back();
  open.untried.pop_back();
  open.next_try =
      open.untried.empty() ? TimePoint::max() : std::chrono::steady_clock::now() + attempt_delay;
  open.candidates.push_back(connect(address));
}

HandshakeQuestions::Candidate HandshakeQuestions::connect(const HostPort& address) const {
  // A REQ, unlike a DEALER, takes none but servers for its peer: no other client, and not itself, to which TCP may
  // connect it while nobody listens at a port of the ephemeral range.
  HandshakeSocket socket(context_, zmq::socket_type::req, max_message_bytes_);
  socket.ref().set(zmq::sockopt::reconnect_ivl, reconnect_interval_ms);
  socket.ref().set(zmq::sockopt::reconnect_ivl_max, longest_reconnect_interval_ms);
  socket.ref().set(zmq::sockopt::connect_timeout, connect_timeout_ms);
  // ZMQ_IMMEDIATE would tell of a connection with less effort, but loses the answer of a server that hangs up after it.
  HandshakeMonitor monitor(context_, socket, ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED | ZMQ_EVENT_CLOSED);
  socket.connect(address);
  return {std::move(socket), std::move(monitor), address.host};
}

void HandshakeQuestions::append_poll_items(std::vector<zmq_pollitem_t>& items) {
  polled_.clear();
  for (const auto& [number, open] : open_) {
    for (const auto& [socket, monitor, address] : open.candidates) {
      items.push_back({socket.ref().handle(), 0, ZMQ_POLLIN, 0});
      items.push_back({monitor.ref().handle(), 0, ZMQ_POLLIN, 0});
      polled_.push_back(number);
    }
  }
}

void HandshakeQuestions::serve(std::span<const zmq_pollitem_t> items) {
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

void HandshakeQuestions::serve(Iterator open, const zmq_pollitem_t& socket, const zmq_pollitem_t& monitor) {
  const auto& candidates = open->second.candidates;
  const auto candidate = std::ranges::find_if(
      candidates, [&](const Candidate& one) { return one.monitor.ref().handle() == monitor.socket; });
  if (candidate == candidates.end() || (socket.revents != 0 && receive(open))) {
    return;
  }
  const auto event = candidate->monitor.receive();
  if (event == ZMQ_EVENT_HANDSHAKE_SUCCEEDED && !open->second.sent) {
    send(open->second, static_cast<std::size_t>(candidate - candidates.begin()));
  } else if (event == ZMQ_EVENT_DISCONNECTED && open->second.sent && !receive(open)) {
    end(open, errc::connection_lost, "connection to " + open->second.question.url + " was lost before an answer came");
  } else if (event == ZMQ_EVENT_CLOSED && !open->second.untried.empty() && candidate + 1 == candidates.end()) {
    try_next(open->second);  // the latest attempt failed: no reason to wait for it
  }
}

void HandshakeQuestions::send(Open& open, std::size_t candidate) const {
  auto connected = std::move(open.candidates[candidate]);
  open.candidates.clear();
  open.candidates.push_back(std::move(connected));
  open.untried.clear();
  open.next_try = TimePoint::max();
  open.sent = open.candidates.front().socket.send({}, open.question.message.encoded());
}

bool HandshakeQuestions::receive(Iterator open) {
  const auto frames = open->second.candidates.front().socket.receive();
  if (frames.empty()) {
    return false;
  }
  const auto& url = open->second.question.url;
  if (frames.size() != 1) {
    end(open, errc::malformed_message, "answer from " + url + " is not a single frame");
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

void HandshakeQuestions::answer(Iterator open, SideMessage message) {
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

std::optional<HandshakeQuestions::TimePoint> HandshakeQuestions::next_deadline() const {
  std::optional<TimePoint> next;
  for (const auto& [number, open] : open_) {
    const TimePoint due = std::min(open.question.deadline, open.next_try);
    next = std::min(next.value_or(due), due);
  }
  return next;
}

void HandshakeQuestions::expire(TimePoint now) {
  for (auto open = open_.begin(); open != open_.end();) {
    const auto candidate = open++;
    const Question& question = candidate->second.question;
    if (question.deadline > now) {
      try {
        if (candidate->second.next_try <= now) {
          try_next(candidate->second);
        }
      } catch (const std::exception&) {
        // Those that are being tried may answer yet.
      }
      continue;
    }
    auto diagnostic = no_answer_in_time(question);
    if (!candidate->second.sent) {
      diagnostic += candidate->second.candidates.empty() ? " (its host was not resolved)" : " (no connection was made)";
    }
    end(candidate, errc::timed_out, diagnostic);
    lookups_.start_waiting();
  }
}

void HandshakeQuestions::close() {
  lookups_.close();
  auto ended = std::exchange(open_, {});
  for (auto& [number, open] : ended) {
    open.candidates.clear();
  }
  for (const auto& [number, open] : ended) {
    end_with_closed(open.question);
  }
}

void HandshakeQuestions::end(Iterator open, std::error_code ec, const std::string& diagnostic,
                             SideMessage message) noexcept {
  const auto on_answer = std::move(open->second.question.on_answer);
  std::string reached = open->second.sent ? std::move(open->second.candidates.front().address) : std::string();
  open_.erase(open);
  try {
    on_answer(ec, std::move(message), diagnostic, std::move(reached));
  } catch (...) {
    kvferry::detail::log_exception("by who asked a question");
  }
}

}  // namespace kvferry::kit
