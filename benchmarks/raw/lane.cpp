// SPDX-License-Identifier: Apache-2.0
#include "lane.hpp"

#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

namespace bench {
namespace {

/// The result of a system call: bytes, or nothing if it would have had to wait.
std::size_t checked(ssize_t result, const char* what) {
  if (result >= 0) {
    return static_cast<std::size_t>(result);
  }
  if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) {
    return 0;
  }
  throw std::system_error(errno, std::system_category(), what);
}

int flags(bool wait) { return wait ? 0 : MSG_DONTWAIT; }

}  // namespace

std::span<iovec> PageCursor::window(std::span<iovec> pieces, std::size_t limit) const {
  std::size_t left = limit == 0 ? SIZE_MAX : limit;
  std::size_t offset = offset_;
  std::size_t count = 0;
  for (; count < std::min(pieces.size(), pages_.size()) && left > 0; ++count) {
    const auto rest = region_->page(first_page_ + pages_[count]).subspan(offset);
    pieces[count] = {rest.data(), std::min(rest.size(), left)};
    left -= pieces[count].iov_len;
    offset = 0;
  }
  return pieces.first(count);
}

void PageCursor::advance(std::size_t bytes) {
  const std::size_t page_size = region_->page(0).size();
  offset_ += bytes;
  pages_ = pages_.subspan(offset_ / page_size);
  offset_ %= page_size;
  at_begin_ = at_begin_ && bytes == 0;
}

Lane::Lane(asio::ip::tcp::socket socket, const LaneOptions& options, const Region& region)
    : socket_(std::move(socket)), step_(options.step), io_(options.io), region_(&region) {
  socket_.set_option(asio::ip::tcp::no_delay(true));
  if (options.send_buffer != 0) {
    socket_.set_option(asio::socket_base::send_buffer_size(static_cast<int>(options.send_buffer)));
  }
  if (options.receive_buffer != 0) {
    socket_.set_option(asio::socket_base::receive_buffer_size(static_cast<int>(options.receive_buffer)));
  }
  const std::string& congestion = options.congestion;
  if (!congestion.empty() && ::setsockopt(descriptor(), IPPROTO_TCP, TCP_CONGESTION, congestion.data(),
                                          static_cast<socklen_t>(congestion.size())) != 0) {
    throw std::system_error(errno, std::system_category(), "congestion control " + congestion);
  }
}

Ring* Lane::ring() {
  if (io_ != Io::calls && !ring_) {
    ring_ = std::make_unique<Ring>(descriptor(), *region_, io_ == Io::ring_zero_copy);
  }
  return ring_.get();
}

bool Lane::send_pages(bool wait) {
  const auto window = cursor_.window(pieces_, step_);
  if (Ring* const by = ring()) {
    cursor_.advance(by->send(window));
    return true;
  }
  msghdr message{};
  message.msg_iov = window.data();
  message.msg_iovlen = window.size();
  const std::size_t sent = checked(::sendmsg(descriptor(), &message, MSG_NOSIGNAL | flags(wait)), "sendmsg");
  cursor_.advance(sent);
  return sent > 0;
}

bool Lane::receive_pages(bool wait) {
  const auto window = cursor_.window(pieces_, step_);
  ssize_t result = 0;
  if (Ring* const by = ring()) {
    result = static_cast<ssize_t>(by->receive(window));
  } else {
    msghdr message{};
    message.msg_iov = window.data();
    message.msg_iovlen = window.size();
    result = ::recvmsg(descriptor(), &message, flags(wait));
  }
  const std::size_t received = checked(result, "recvmsg");
  cursor_.advance(received);
  ended_ = result == 0;
  if (ended_ && !cursor_.at_begin()) {
    throw std::runtime_error("the connection ended in the middle of a batch");
  }
  return result >= 0;
}

bool Lane::receive_tokens(bool wait) {
  std::array<std::byte, 256> bytes{};
  const ssize_t result = ::recv(descriptor(), bytes.data(), bytes.size(), flags(wait));
  tokens_ += checked(result, "recv");
  ended_ = result == 0;
  return result >= 0;
}

void Lane::send_token() {
  const std::byte token{};
  checked(::send(descriptor(), &token, 1, MSG_NOSIGNAL), "send");
}

Idling::Idling(const LaneOptions& options, bool sending)
    : wait_(options.wait), sending_(sending), spin_(std::chrono::microseconds(options.spin_us)) {}

void Idling::idle(std::span<Lane> lanes) {
  if (wait_ == Wait::poll) {
    return;
  }
  if (wait_ == Wait::adaptive) {
    const auto now = Clock::now();
    if (!std::exchange(spinning_, true)) {
      since_ = now;
    }
    if (now - since_ < spin_) {
      return;
    }
  }
  std::vector<pollfd> events;
  events.reserve(lanes.size());
  for (auto& lane : lanes) {
    const bool sending = sending_ && lane.busy();
    events.push_back({lane.ended() ? -1 : lane.descriptor(), static_cast<short>(POLLIN | (sending ? POLLOUT : 0)), 0});
  }
  checked(::poll(events.data(), events.size(), -1), "poll");
}

}  // namespace bench
