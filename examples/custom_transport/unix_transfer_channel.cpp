// SPDX-License-Identifier: Apache-2.0
#include "unix_transfer_channel.hpp"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <asio/posix/stream_descriptor.hpp>
#include <asio/steady_timer.hpp>

#include <algorithm>
#include <array>
#include <cerrno>

#include <kvferry/kit/checks.hpp>
#include <kvferry/kit/make_dial.hpp>
#include <kvferry/kit/random_bytes.hpp>
#include <kvferry/kit/weak_calls.hpp>

namespace unix_transport {

namespace kit = kvferry::kit;
using kvferry::Bytes;
using kvferry::errc;
using kvferry::TransferError;
constexpr std::size_t name_bytes = 24;  // of a socket

/// A socket to one peer, and kvferry's protocol for streams on it. One mutex guards both, so no buffer is touched any more
/// when an operation has ended.
class UnixLink final : public kit::Link, public std::enable_shared_from_this<UnixLink> {
 public:
  /// @param descriptor the dialing side's connected socket, or the accepting side's, at which the peer is expected.
  UnixLink(const asio::any_io_executor& executor, std::shared_ptr<kit::LinkHost> host, int descriptor, bool listening,
           kit::LinkHandler on_link)
      : host_(std::move(host)),
        protocol_(host_),
        socket_(executor, descriptor),
        timer_(executor),
        on_link_(std::move(on_link)),
        listening_(listening) {}

  /// Waits for the peer, until `deadline`, and then calls the `LinkHandler`.
  void greet(kit::Attempts<UnixLink>& attempts, kit::Clock::time_point deadline) {
    if (!attempts.add(shared_from_this())) {
      shut(errc::closed, "the channel was closed");
      return;
    }
    host_->when_abandoned(posted([](UnixLink& link) { link.break_off(errc::cancelled, "a newer attempt began"); }));
    locked([&] {
      running_ = !listening_;
      arm_timer(deadline);
    });
  }

  void start(std::shared_ptr<kit::Operation> operation) override {
    locked([&] {
      const std::size_t count = operation->object_count();
      protocol_.start(std::make_shared<kit::StripedOperation>(operation, 1), {0, count});
    });
  }

  void stop(std::shared_ptr<kit::Operation> operation) override {
    locked([&] {
      protocol_.stop(*operation);
      if (const auto since = protocol_.draining_since()) {
        arm_timer(*since + drain_time);
      }
    });
  }

  void probe(std::function<void()> answered) override {
    locked([&] { protocol_.probe([this, answered] { later_.push_back(answered); }); });
  }

  bool fence(std::function<void()> done) override {
    locked([&] { protocol_.fence([this, done] { later_.push_back(done); }); });
    return true;
  }

  void region_added() override {
    locked([&] { protocol_.region_added(); });
  }

  bool region_removed(std::uint32_t number, std::function<void()> done) override {
    locked([&] { protocol_.region_removed(number, [this, done] { later_.push_back(done); }); });
    return true;
  }

  std::optional<Pause> take_leave() override {
    std::optional<Pause> pause;
    locked([&] {
      protocol_.leave();
      leaving_until_ = leaving_until_.value_or(kit::Clock::now() + drain_time);
      pump();
      if (running_ && !broken_ && !protocol_.settled() && kit::Clock::now() < *leaving_until_) {
        const std::vector<int> descriptors{socket_.native_handle()};
        pause = Pause{descriptors, *leaving_until_, wants_to_send() ? descriptors : std::vector<int>()};
      }
    });
    return pause;
  }

  void shut(std::error_code cause, const std::string& why) override {
    std::unique_lock lock(mutex_);
    told_ = true;
    break_off(cause, why);
    protocol_.fail(cause, why);
    if (on_link_) {
      later_.push_back([on_link = std::exchange(on_link_, nullptr), cause, why] { on_link(cause, nullptr, why); });
    }
    timer_.cancel();
    socket_.close();
    call_later(lock);
  }

  std::size_t descriptors() const noexcept override { return 1; }
  bool take_used() noexcept override { return protocol_.take_used(); }
  std::string path() const override { return "unix"; }

 private:
  using Wait = asio::posix::stream_descriptor::wait_type;
  /// The time that a peer has to answer for an operation that was given up, before the connection is given up, too.
  static constexpr std::chrono::milliseconds drain_time{100};
  static constexpr std::size_t step_bytes = std::size_t{256} << 10;

  /// Runs `function` and moves what there is to move; then calls, without the mutex, what has become ready.
  template <class Function>
  void locked(Function function) {
    std::unique_lock lock(mutex_);
    function();
    pump();
    if (broken_ && !std::exchange(told_, true)) {
      later_.push_back([this] {
        host_->link_failed(*this, broken_);  // before operations end: what is started upon that reconnects
        shut(broken_, why_);
      });
    }
    call_later(lock);
  }

  void call_later(std::unique_lock<std::mutex>& lock) {
    const auto calls = std::exchange(later_, {});
    lock.unlock();
    for (const auto& call : calls) {
      call();
    }
  }

  void break_off(std::error_code cause, std::string why) {
    why_ = broken_ ? why_ : std::move(why);
    broken_ = broken_ ? broken_ : cause;
  }

  void accept_peer() {
    const int descriptor = ::accept4(socket_.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (descriptor < 0 && errno != EAGAIN) {
      break_off({errno, std::system_category()}, "accepting the peer's connection");
    }
    ucred user{};
    socklen_t size = sizeof(user);
    if (::getsockopt(descriptor, SOL_SOCKET, SO_PEERCRED, &user, &size) != 0 || user.uid != ::geteuid()) {
      ::close(descriptor);  // a stranger, or nobody
      return;
    }
    socket_.close();
    socket_.assign(descriptor);
    listening_ = false;
    protocol_.say(std::array{std::byte{1}});  // the welcome
    hand_over();
  }

  /// Nothing moves until the kit has the link: it lets go of an older one first.
  void hand_over() {
    running_ = false;
    timer_.cancel();
    later_.push_back([self = shared_from_this(), on_link = std::exchange(on_link_, nullptr)] {
      on_link({}, self, {});
      self->locked([&] {
        self->protocol_.region_added();  // since the handshake was made
        self->running_ = true;
      });
    });
  }

  /// Sends and receives until nothing goes any more, or for long enough: then the next event goes on.
  void pump() {
    bool moved = true;
    for (int rounds = 0; moved && rounds < 16 && running_ && !broken_; ++rounds) {
      moved = send_some();
      moved = receive_some() || moved;
    }
    if ((running_ || listening_) && !broken_) {
      wait_for(Wait::wait_read, waits_to_read_);
      if (wants_to_send()) {
        wait_for(Wait::wait_write, waits_to_write_);
      }
    }
  }

  bool wants_to_send() {
    if (on_link_ || deaf_) {
      return false;
    }
    protocol_.fill(step_bytes);
    return !protocol_.out().empty();
  }

  bool send_some() {
    if (!wants_to_send()) {
      return false;
    }
    std::array<iovec, 64> pieces;
    msghdr message{};
    message.msg_iov = pieces.data();
    message.msg_iovlen = protocol_.out().front(pieces, step_bytes);
    const auto sent = ::sendmsg(socket_.native_handle(), &message, MSG_NOSIGNAL);
    if (sent > 0) {
      protocol_.sent(static_cast<std::size_t>(sent));
    } else if (errno != EAGAIN && errno != EINTR) {
      deaf_ = true;  // the peer has gone; its last answers may still be here
    }
    return sent > 0;
  }

  bool receive_some() {
    std::array<std::byte, 4096> discarded;
    std::array<iovec, 64> pieces{iovec{discarded.data(), 1}};
    std::size_t count = on_link_ ? 1 : protocol_.reader().prepare(pieces, step_bytes);
    if (count == 0) {
      pieces[count++] = {discarded.data(), std::min(discarded.size(), protocol_.reader().discardable())};
    }
    const auto received = ::readv(socket_.native_handle(), pieces.data(), static_cast<int>(count));
    if (received > 0 && on_link_) {
      hand_over();  // that was the welcome
    } else if (received > 0) {
      if (const auto violation = protocol_.received(static_cast<std::size_t>(received))) {
        break_off(violation, protocol_.violation());
      } else if (protocol_.take_fence()) {
        host_->when_writes_ended(posted([](UnixLink& link) { link.protocol_.answer_fence(); }));
      }
    } else if (received == 0) {
      break_off(errc::peer_closed, "the peer closed the connection");
    } else if (errno != EAGAIN && errno != EINTR) {
      break_off({errno, std::system_category()}, "the connection broke");
    }
    return received > 0;
  }

  void wait_for(Wait type, bool& waits) {
    if (!std::exchange(waits, true)) {
      socket_.async_wait(type, [self = shared_from_this(), &waits](std::error_code) {
        self->locked([&] {
          waits = false;
          if (self->listening_ && !self->broken_) {
            self->accept_peer();
          }
        });
      });
    }
  }

  void arm_timer(kit::Clock::time_point when) {
    timer_.expires_at(when);
    timer_.async_wait(
        kit::when_expired(weak_from_this(), [](UnixLink& self) { self.locked([&self] { self.timer_expired(); }); }));
  }

  /// The channel may call it with locks held, or within a call of this link: so the executor calls the function.
  template <class Function>
  std::function<void()> posted(Function function) {
    return kit::posted(timer_.get_executor(), weak_from_this(),
                       [function](UnixLink& self) { self.locked([&] { function(self); }); });
  }

  void timer_expired() {
    const auto since = protocol_.draining_since();
    if (on_link_) {
      break_off(errc::timed_out, "the peer did not connect its socket in time");
    } else if (since && kit::Clock::now() - *since >= drain_time) {
      break_off(errc::connection_lost, "the peer did not answer for an operation that was given up");
    } else if (since) {
      arm_timer(*since + drain_time);
    }
  }

  const std::shared_ptr<kit::LinkHost> host_;
  std::mutex mutex_;  ///< Guards all below.
  kit::StreamProtocol protocol_;
  asio::posix::stream_descriptor socket_;
  asio::steady_timer timer_;
  kit::LinkHandler on_link_;  ///< Empty once the link has been handed over.
  bool listening_;
  bool running_ = false;
  bool deaf_ = false;  ///< The peer takes nothing any more.
  bool waits_to_read_ = false;
  bool waits_to_write_ = false;
  std::optional<kit::Clock::time_point> leaving_until_;
  std::error_code broken_;
  std::string why_;
  bool told_ = false;
  std::vector<std::function<void()>> later_;  ///< To be called without the mutex.
};

namespace {

/// Binds or connects a socket of an abstract name. @throws TransferError with the errno.
template <class Call>
int open_socket(Call call, const Bytes& name) {
  sockaddr_un address{.sun_family = AF_UNIX, .sun_path = {}};
  std::ranges::copy(name, reinterpret_cast<std::byte*>(address.sun_path + 1));
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  const int descriptor = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (descriptor < 0 || call(descriptor, reinterpret_cast<const sockaddr*>(&address), size) != 0) {
    const std::error_code cause(errno, std::system_category());
    ::close(descriptor);
    throw TransferError(cause, "a Unix-domain socket");
  }
  return descriptor;
}

}  // namespace

UnixTransferChannel::UnixTransferChannel(kvferry::ChannelOptions options) : TransferChannelKit(options) {
  kit::refuse_dmabufs(options.regions, "unix");
  start();
}

UnixTransferChannel::~UnixTransferChannel() {
  close();
  run_handlers_left();
}

std::unique_ptr<kit::Dial> UnixTransferChannel::dial(const std::string&) {
  return kit::make_dial({}, [executor = get_executor(), attempts = attempts_](auto host, const Bytes& name,
                                                                              auto deadline, auto on_link) {
    if (name.size() != name_bytes) {
      throw TransferError(errc::malformed_message, "peer \"" + host->peer().id + "\" answered with no socket's name");
    }
    const int descriptor = open_socket(::connect, name);
    std::make_shared<UnixLink>(executor, host, descriptor, false, std::move(on_link))->greet(*attempts, deadline);
  });
}

/// Each attempt has a socket of its own, of a name that nobody guesses: who connects to it is the peer.
Bytes UnixTransferChannel::accept(std::shared_ptr<kit::LinkHost> host, const Bytes&, kit::Clock::time_point deadline,
                                  kit::LinkHandler on_link) {
  const Bytes name = kit::random_bytes(name_bytes);
  const int descriptor = open_socket(::bind, name);
  ::listen(descriptor, 4);
  std::make_shared<UnixLink>(get_executor(), host, descriptor, true, std::move(on_link))->greet(*attempts_, deadline);
  return name;
}

void UnixTransferChannel::stop_listening() {
  attempts_->close([](UnixLink& link) { link.shut(errc::closed, "the channel was closed"); });
}

}  // namespace unix_transport
