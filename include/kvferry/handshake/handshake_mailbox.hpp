// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <variant>
#include <vector>

#include <kvferry/kit/handshake_service.hpp>
#include <kvferry/side_message.hpp>
#include <kvferry/url.hpp>

#include <kvferry/detail/event_descriptor.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// A request that gets one reply. Its state says whose reply that is, so that the handler's reply, the one for a
/// dropped `Reply` and the one for an exception never add up to two.
struct ServedRequest {
  enum class State : std::uint8_t { waiting, answered, dropped, failed };

  ServedRequest(std::vector<Bytes> routing, std::string from, std::string whose_key = {})
      : envelope(std::move(routing)), source(std::move(from)), key(std::move(whose_key)) {}

  /// Whether the state was `from` and now is `to`.
  bool advance(State from, State to) noexcept { return state.compare_exchange_strong(from, to); }

  const std::vector<Bytes> envelope;  ///< The frames in front of the request, and of its reply.
  const std::string source;           ///< Where it came from.
  const std::string key;              ///< The public key of who sent it; empty without keys.
  std::atomic<State> state{State::waiting};
};

/// Work for the service's thread: a reply to a request. Void if the request's state has moved on from `state`.
struct ReplyCommand {
  std::shared_ptr<ServedRequest> request;
  ServedRequest::State state;
  Bytes encoded;
};

/// Work for the service's thread: a question to ask.
struct Question {
  std::string url;
  SideMessage message;
  std::chrono::steady_clock::time_point asked_at;
  std::chrono::steady_clock::time_point deadline;
  HandshakeService::AnswerHandler on_answer;
  std::string peer_id = {};  ///< Who is to answer; empty if that isn't known.
};

/// Work for the service's thread: the addresses of the host in a question's url.
struct ResolvedCommand {
  std::uint64_t question;
  std::error_code error;
  std::vector<HostPort> addresses;  ///< In the order in which to try them.
};

using Command = std::variant<ReplyCommand, Question, ResolvedCommand>;

/// Other threads' messages to the service's thread, and the event that wakes it. Thread-safe.
class HandshakeMailbox {
 public:
  /// Readable when there is something to take or the mailbox was closed.
  [[nodiscard]] int event_fd() const noexcept { return event_.descriptor(); }

  /// Moves a command to the reader, unless that has retired; then returns false and the command is as it was.
  bool post(Command& command);

  /// Takes everything that is there.
  std::vector<Command> take();

  /// Tells the reader to stop serving. It goes on reading until it retires.
  void close();
  [[nodiscard]] bool closed() const;

  /// Refuses all further commands, if none is waiting. Otherwise does nothing and returns false.
  bool retire();
  /// Accepts commands again, for a new reader.
  void reopen();

 private:
  const EventDescriptor event_;
  mutable std::mutex mutex_;
  std::vector<Command> commands_;
  bool closed_ = false;
  bool retired_ = false;
};

/// The parts that a `Reply` needs: both may be gone before it is.
struct HandshakeService::Reply::State {
  std::weak_ptr<HandshakeMailbox> mailbox;
  std::shared_ptr<ServedRequest> request;

  void send(ServedRequest::State as, const SideMessage& answer) const;
};

}  // namespace kvferry::kit
