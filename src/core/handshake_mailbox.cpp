// SPDX-License-Identifier: Apache-2.0
#include "handshake_mailbox.hpp"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

namespace kvferry::kit {
namespace {

int make_event_fd() {
  const int fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) {
    throw TransferError({errno, std::system_category()}, "cannot create an eventfd");
  }
  return fd;
}

}  // namespace

HandshakeMailbox::HandshakeMailbox() : event_fd_(make_event_fd()) {}

HandshakeMailbox::~HandshakeMailbox() { ::close(event_fd_); }

bool HandshakeMailbox::post(Command& command) {
  const std::lock_guard lock(mutex_);
  if (retired_) {
    return false;
  }
  commands_.push_back(std::move(command));
  wake();
  return true;
}

std::vector<Command> HandshakeMailbox::take() {
  const std::lock_guard lock(mutex_);
  if (!closed_) {
    std::uint64_t count = 0;
    [[maybe_unused]] const auto size = ::read(event_fd_, &count, sizeof(count));
  }
  return std::exchange(commands_, {});
}

void HandshakeMailbox::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  wake();
}

bool HandshakeMailbox::closed() const {
  const std::lock_guard lock(mutex_);
  return closed_;
}

bool HandshakeMailbox::retire() {
  const std::lock_guard lock(mutex_);
  retired_ = commands_.empty();
  return retired_;
}

void HandshakeMailbox::reopen() {
  const std::lock_guard lock(mutex_);
  retired_ = false;
}

void HandshakeMailbox::wake() noexcept {
  // Fails only when the counter is full, and then the event is set already.
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto size = ::write(event_fd_, &one, sizeof(one));
}

void HandshakeService::Reply::State::send(ServedRequest::State as, const SideMessage& answer) const {
  if (!request->advance(ServedRequest::State::waiting, as)) {
    return;
  }
  if (const auto open = mailbox.lock()) {
    Command command = ReplyCommand{request, as, answer.encoded()};
    open->post(command);
  }
}

HandshakeService::Reply::Reply(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}

HandshakeService::Reply::Reply(Reply&&) noexcept = default;

HandshakeService::Reply& HandshakeService::Reply::operator=(Reply&& other) noexcept {
  const Reply replaced(std::exchange(state_, std::move(other.state_)));
  return *this;
}

HandshakeService::Reply::~Reply() {
  if (state_) {
    state_->send(ServedRequest::State::dropped,
                 encode_side_message(SideMessageError{static_cast<std::int64_t>(errc::handshake_failed),
                                                      "the request was dropped without an answer"}));
  }
}

void HandshakeService::Reply::operator()(const SideMessage& answer) {
  if (const auto state = std::move(state_)) {
    state->send(ServedRequest::State::answered, answer);
  }
}

}  // namespace kvferry::kit
