// SPDX-License-Identifier: Apache-2.0
#pragma once

// A lane and its socket: bytes that it sends and receives, and what it waits for.
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <optional>
#include <span>
#include <utility>

#include <kvferry/tcp/lane-inl.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

KVFERRY_INLINE Lane::Step Lane::send_step(std::size_t& budget) {
  // Frames are queued late: until then they can still be dropped.
  if (!writable_) {
    return Step::blocked;
  }
  if (by_cpu_ && socket_->holds_back() && socket_->flush() != 0) {
    return send_failed();
  }
  // Where receiving has used up the budget, something is sent all the same.
  const std::size_t step = std::min(by_cpu_ ? encrypted_step_bytes : send_step_bytes, std::max(budget, caller_bytes));
  protocol_.fill(step);
  if (protocol_.out().empty()) {
    return Step::nothing;
  }
  std::array<iovec, max_pieces> pieces;
  const std::size_t queued = protocol_.out().bytes();
  // A short rest takes no call of its own, neither here nor at the receiver: a frame is longer than a step by its header.
  const std::size_t bytes = queued - std::min(queued, step) <= step / 4 ? queued : step;
  std::size_t count = protocol_.out().front(pieces, bytes);
  if (careful_out_ != 0) {
    count = 1;
    pieces[0].iov_len = std::min(pieces[0].iov_len, left_on_page(pieces[0].iov_base));
  }
  auto outgoing = std::span(pieces).first(count);
  if (by_cpu_ && !keep_to_room(outgoing)) {
    writable_ = false;
    return Step::blocked;
  }
  ssize_t sent = -1;
  // NOLINTNEXTLINE(bugprone-branch-clone): memory is checked only if neither of these is true
  if (!by_cpu_ || protocol_.sends_what_is_there(outgoing)) {
    sent = socket_->send(outgoing);
  } else if (socket_->kernel_copies()) {
    sent = socket_->send_payload(outgoing);
  } else if (protocol_.can_read(outgoing)) {
    sent = socket_->send(outgoing);
  } else {
    errno = EFAULT;
  }
  if (sent >= 0) {
    options_.traffic->sent.fetch_add(static_cast<std::size_t>(sent), std::memory_order_relaxed);
    protocol_.sent(static_cast<std::size_t>(sent));
    moved_ += static_cast<std::size_t>(sent);
    tired_ = false;
    careful_out_ -= std::min(careful_out_, static_cast<std::size_t>(sent));
    budget -= std::min(budget, static_cast<std::size_t>(sent) + outgoing.size() * piece_cost);
    return Step::progress;
  }
  return send_failed();
}

/// Whether memory is there is not asked of what there is no room for. @return false if there is none.
KVFERRY_INLINE bool Lane::keep_to_room(std::span<iovec>& pieces) {
  std::size_t wanted = 0;
  for (const iovec& piece : pieces) {
    wanted += piece.iov_len;
  }
  std::size_t room = socket_->room(wanted);
  std::size_t count = 0;
  for (; count < pieces.size() && room != 0; ++count) {
    pieces[count].iov_len = std::min(pieces[count].iov_len, room);
    room -= pieces[count].iov_len;
  }
  pieces = pieces.first(count);
  return count != 0;
}

KVFERRY_INLINE Lane::Step Lane::send_failed() {
  if (errno == EFAULT && careful_out_ == 0) {
    careful_out_ = fault_reach;
    return Step::progress;
  }
  if (errno == EFAULT && protocol_.source_failed()) {
    careful_out_ = 0;
    return Step::progress;
  }
  if (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS) {
    writable_ = false;
    return Step::blocked;
  }
  if (errno != EINTR) {
    // The peer's last frames may still be in the socket. After a senseless frame no further one counts.
    std::size_t left = errno == senseless_peer ? 0 : last_words_bytes;
    const auto cause = last_error(*socket_);
    std::string why = "sending to " + remote_ + ": " + last_reason(*socket_);
    readable_ = true;
    const auto socket = socket_;  // a failure takes it away
    while (!failed_ && left != 0) {
      const std::uint64_t moved_before = moved_;
      const std::uint64_t records_before = socket->records();
      std::size_t unlimited = std::numeric_limits<std::size_t>::max();
      if (receive_step(unlimited) != Step::progress) {
        break;
      }
      left -= std::min(left, static_cast<std::size_t>(moved_ - moved_before) + round_cost +
                                 static_cast<std::size_t>(socket->records() - records_before) * record_cost);
    }
    fail(cause, std::move(why));
  }
  return Step::progress;
}

KVFERRY_INLINE Lane::Step Lane::receive_step(std::size_t& budget) {
  if (!readable_) {
    return Step::nothing;
  }
  std::array<iovec, max_pieces> pieces;
  FrameReader& reader = protocol_.reader();
  ssize_t received = 0;
  std::size_t asked = 0;
  const std::uint64_t records_before = by_cpu_ ? socket_->records() : 0;
  const std::size_t count = careful_in_ != 0 ? reader.prepare_page(pieces) : reader.prepare(pieces, receive_step_bytes);
  if (count != 0) {
    for (const iovec& piece : std::span(pieces).first(count)) {
      asked += piece.iov_len;
    }
    const auto wanted = std::span(pieces).first(count);
    received = hears_bells_ && reader.wants_payload() ? socket_->receive_payload(wanted) : socket_->receive(wanted);
  } else {
    asked = std::min(reader.discardable(), receive_step_bytes);
    received = socket_->discard(asked);
  }
  const std::uint64_t records = by_cpu_ ? socket_->records() : 0;
  if (received > 0) {
    // Less than asked for was all that there was; what has come meanwhile, the wait reports at once.
    readable_ = static_cast<std::size_t>(received) == asked || (by_cpu_ && socket_->over());
    // Before an operation ends of it, whose caller may then ask for the statistics.
    options_.traffic->received.fetch_add(static_cast<std::size_t>(received), std::memory_order_relaxed);
    const FrameReader::Progress before = reader.progress();
    if (const auto ec = protocol_.received(static_cast<std::size_t>(received))) {
      fail(ec, remote_ + ": " + protocol_.violation());
    } else if (protocol_.take_fence()) {
      await_writes();
    }
    careful_in_ -= std::min(careful_in_, static_cast<std::size_t>(received));
    const FrameReader::Progress& now = reader.progress();
    budget -=
        std::min(budget, static_cast<std::size_t>(received) + static_cast<std::size_t>(now.fetched - before.fetched) +
                             static_cast<std::size_t>(now.frames - before.frames) * frame_cost +
                             static_cast<std::size_t>(now.pieces - before.pieces) * piece_cost +
                             static_cast<std::size_t>(records - records_before) * record_cost);
    moved_ += static_cast<std::size_t>(received);
    tired_ = false;
    return Step::progress;
  }
  if (received == 0) {
    fail(errc::peer_closed, remote_ + " closed the connection");
  } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
    readable_ = false;
    return Step::blocked;
  } else if (errno == EFAULT && careful_in_ == 0) {
    careful_in_ = fault_reach;
  } else if (errno == EFAULT && reader.destination_failed()) {
    careful_in_ = 0;
  } else if (errno != EINTR) {
    fail(last_error(*socket_), "receiving from " + remote_ + ": " + last_reason(*socket_));
  }
  return Step::progress;
}

KVFERRY_INLINE Lane::Step Lane::copy_step(std::size_t& budget) {
  const auto copied = protocol_.copy_part();
  if (copied.failure) {
    fail(errc::connection_lost, remote_ + ": reading the peer's memory: " + copied.failure.message());
  }
  readable_ |= copied.hung_up;
  moved_ += copied.bytes;
  budget -= std::min(budget, copied.bytes + copied.pieces * piece_cost);
  return copied.bytes != 0 || copied.hung_up ? Step::progress : Step::nothing;
}

KVFERRY_INLINE bool Lane::wait_for_more(Role role) {
  if ((role == Role::waiting_leader || role == Role::leaving) && hears_bells_) {
    wants_to_send_ = false;  // room has a bell as well
    if (!may_wait()) {
      return false;
    }
    if (armed_ != 0) {
      armed_ = 0;
      arm(0);  // it would wake another thread beside this one, which might take what this one waits for
    }
    return true;
  }
  if (role != Role::visitor || leader_ == std::this_thread::get_id()) {
    // With bells it may stay as it is: they ring only if somebody says that he waits.
    if (role != Role::leaving && armed_ != 0 && !hears_bells_) {
      armed_ = 0;
      arm(0);
    }
    wants_to_send_ = !writable_ && !hears_bells_;
    return true;
  }
  if (leader_ != std::thread::id() || leaving_) {
    // The leader may not know that there is something to send. Nor, if it sleeps, that this thread has had the word taken back
    // that somebody waits. The same holds for who takes leave.
    if (hears_bells_) {
      return may_wait();
    }
    if (!writable_) {
      arm(EPOLLOUT);
    }
    return true;
  }
  if (std::exchange(may_leave_, false) && leave_unattended()) {
    return true;
  }
  unattended_ = false;
  if (!watched_ && !tired_ && options_.poller) {
    watched_ = options_.poller->watch(shared_from_this());
  }
  if (watched_) {
    return true;
  }
  if (!hears_bells_) {
    arm(writable_ ? EPOLLIN : EPOLLIN | EPOLLOUT);
    return true;
  }
  if (!may_wait()) {
    return false;
  }
  arm(EPOLLIN);
  return true;
}

KVFERRY_INLINE bool Lane::may_wait() { return socket_->may_wait(!writable_); }

KVFERRY_INLINE void Lane::arm(std::uint32_t events) {
  if ((events & ~armed_) == 0 && events != 0) {
    return;
  }
  armed_ |= events;
  std::error_code ec;
  options_.events->arm(socket_->descriptor(), armed_, ec);
  if (ec) {
    fail(ec, "waiting for " + remote_ + ": " + ec.message());
  }
}

KVFERRY_INLINE void Lane::update_drain_timer() {
  if (protocol_.drains_nothing() && !outlived_) {
    return;
  }
  auto since = protocol_.draining_since();
  if (outlived_ && (!since || outlived_->since < *since)) {
    since = outlived_->since;
  }
  if (!since || drain_timer_armed_) {
    return;
  }
  drain_timer_armed_ = true;
  drain_timer_.expires_at(*since + options_.drain_timeout);
  drain_timer_.async_wait([self = shared_from_this()](std::error_code ec) {
    if (ec != asio::error::operation_aborted) {
      self->driver_.put([](Inbox& inbox) { inbox.drain_expired = true; });
      self->drive_on_io_thread();
    }
  });
}

KVFERRY_INLINE void Lane::update_frame_timer() {
  const FrameReader& reader = protocol_.reader();
  if (frame_watched_ || !reader.within_frame()) {
    return;
  }
  frame_watched_ = reader.progress();
  frame_timer_.expires_after(options_.frame_timeout);
  frame_timer_.async_wait([self = shared_from_this()](std::error_code ec) {
    if (ec != asio::error::operation_aborted) {
      self->driver_.put([](Inbox& inbox) { inbox.frame_expired = true; });
      self->drive_on_io_thread();
    }
  });
}

KVFERRY_INLINE void Lane::frame_expired() {
  if (failed_) {
    return;
  }
  // It may be this side that hasn't looked: then the peer, who may have waited for room, gets its time once more, but not
  // for ever: what comes at this very moment need not have come before.
  std::size_t unlimited = receive_step_bytes;
  readable_ = true;
  (void)receive_step(unlimited);
  const auto then = *std::exchange(frame_watched_, std::nullopt);
  const FrameReader& reader = protocol_.reader();
  const auto& now = reader.progress();
  if (protocol_.last_received() >= frame_timer_.expiry() && frame_prolonged_ != now.frames) {
    frame_prolonged_ = now.frames;
    return;
  }
  if (!failed_ && reader.within_frame() && now.frames == then.frames &&
      now.bytes - then.bytes < least_progress) {
    fail(errc::connection_lost, remote_ + " stopped within a frame: " + std::to_string(now.bytes - then.bytes) +
                                    " bytes of it in " + std::to_string(options_.frame_timeout.count()) + " ms");
  }
}

}  // namespace kvferry::tcp
