// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/handshake/handshake_mailbox.hpp>

#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

#include <kvferry/detail/side_message_error.hpp>
#include <kvferry/kit/failure.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

KVFERRY_INLINE bool HandshakeMailbox::post(Command& command) {
  const std::lock_guard lock(mutex_);
  if (retired_) {
    return false;
  }
  commands_.push_back(std::move(command));
  event_.set();
  return true;
}

KVFERRY_INLINE std::vector<Command> HandshakeMailbox::take() {
  const std::lock_guard lock(mutex_);
  if (!closed_) {
    event_.clear();
  }
  return std::exchange(commands_, {});
}

KVFERRY_INLINE void HandshakeMailbox::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  event_.set();
}

KVFERRY_INLINE bool HandshakeMailbox::closed() const {
  const std::lock_guard lock(mutex_);
  return closed_;
}

KVFERRY_INLINE bool HandshakeMailbox::retire() {
  const std::lock_guard lock(mutex_);
  retired_ = commands_.empty();
  return retired_;
}

KVFERRY_INLINE void HandshakeMailbox::reopen() {
  const std::lock_guard lock(mutex_);
  retired_ = false;
}

KVFERRY_INLINE void HandshakeService::Reply::State::send(ServedRequest::State as, const SideMessage& answer) const {
  if (!request->advance(ServedRequest::State::waiting, as)) {
    return;
  }
  if (const auto open = mailbox.lock()) {
    Command command = ReplyCommand{request, as, answer.encoded()};
    open->post(command);
  }
}

KVFERRY_INLINE HandshakeService::Reply::Reply(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}

KVFERRY_INLINE HandshakeService::Reply::Reply(Reply&&) noexcept = default;

KVFERRY_INLINE HandshakeService::Reply& HandshakeService::Reply::operator=(Reply&& other) noexcept {
  const Reply replaced(std::exchange(state_, std::move(other.state_)));
  return *this;
}

KVFERRY_INLINE HandshakeService::Reply::~Reply() {
  if (state_) {
    // It goes, above all, where memory is used up. Then who has asked isn't told, either.
    if_memory_lasts([&] {
      state_->send(ServedRequest::State::dropped,
                   refusal(errc::handshake_failed, "the request was dropped without an answer"));
    });
  }
}

KVFERRY_INLINE std::string HandshakeService::Reply::source() const {
  return state_ ? state_->request->source : std::string();
}

KVFERRY_INLINE std::string HandshakeService::Reply::key() const {
  return state_ ? state_->request->key : std::string();
}

KVFERRY_INLINE void HandshakeService::Reply::operator()(const SideMessage& answer) {
  if (const auto state = std::move(state_)) {
    state->send(ServedRequest::State::answered, answer);
  }
}

}  // namespace kvferry::kit
