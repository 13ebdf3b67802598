// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/handshake/handshake_attempts.hpp>
#include <kvferry/handshake/handshake_mailbox.hpp>
#include <kvferry/handshake/handshake_sockets.hpp>
#include <kvferry/detail/name_lookups.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The questions that are on their way, each on sockets of its own. Used by the service's thread alone.
class HandshakeQuestions {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  /// @param keyring null without keys.
  HandshakeQuestions(const SharedContext& context, std::size_t max_message_bytes,
                     std::weak_ptr<HandshakeMailbox> mailbox, std::shared_ptr<const Keyring> keyring = nullptr)
      : context_(context),
        max_message_bytes_(max_message_bytes),
        mailbox_(std::move(mailbox)),
        keyring_(std::move(keyring)) {}

  void start(Question&& question);
  void resolved(ResolvedCommand&& command);

  /// Adds what to wait for; `serve` has to be given the same items, in this order, after the wait.
  void append_poll_items(std::vector<zmq_pollitem_t>& items);
  void serve(std::span<const zmq_pollitem_t> items);

  [[nodiscard]] std::optional<TimePoint> next_deadline() const;
  /// Does what is due: ends questions, tries further addresses.
  void expire(TimePoint now);

  /// Closes all sockets, then ends all questions with `errc::closed`.
  void close();

 private:
  struct Open {
    Question question = {};
    HandshakeAttempts attempts = {};  ///< None until the host's name is resolved.
    bool sent = false;                ///< By the only candidate that is left.
    std::size_t repeats = 0;          ///< How often it was sent again, after its connection was lost.
    std::vector<std::string> server_keys = {};
    std::string refusal = {};         ///< What the latest that said no gave for a reason.
  };
  using Iterator = std::map<std::uint64_t, Open>::iterator;

  void begin(Iterator open);
  /// Ends the question with what `work` throws.
  template <class Work>
  void guarded(std::uint64_t number, Work work) noexcept;
  void connect(Iterator open, std::span<const HostPort> addresses);
  void advance(Open& open, TimePoint now);
  void serve(Iterator open, const zmq_pollitem_t& socket, const zmq_pollitem_t& monitor);
  [[nodiscard]] std::string why_hopeless(const Open& open, TimePoint now) const;
  void judge(Open& open, HandshakeAttempts::Candidate& candidate, int event, std::uint32_t value);
  /// @return whether there was anything to receive, so that the question has ended.
  bool receive(Iterator open);
  void answer(Iterator open, SideMessage message);
  void end(Iterator open, std::error_code ec, const std::string& diagnostic, SideMessage message = {}) noexcept;

  const SharedContext& context_;
  std::size_t max_message_bytes_;
  std::weak_ptr<HandshakeMailbox> mailbox_;
  std::shared_ptr<const Keyring> keyring_;
  std::uint64_t next_number_ = 0;
  ConnectSlots slots_;
  std::map<std::uint64_t, Open> open_;
  std::vector<std::uint64_t> polled_;
  NameLookups lookups_;
};

/// Ends a question that was asked of a closed service.
void end_with_closed(const Question& question) noexcept;

}  // namespace kvferry::kit
