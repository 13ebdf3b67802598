// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/shm/meeting.hpp>

#include <sys/socket.h>
#include <unistd.h>

#include <asio/post.hpp>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include <kvferry/detail/text.hpp>
#include <kvferry/error.hpp>
#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/weak_calls.hpp>

namespace kvferry::inline KVFERRY_ABI::shm {
inline namespace internal {

/// Connections at a time that haven't shown whose they are; the oldest gives way to one more.
inline constexpr std::size_t most_candidates = 8;

KVFERRY_INLINE void copy_secret(const Bytes& from, tcp::Secret& to) {
  std::copy_n(from.begin(), std::min(from.size(), to.size()), to.begin());
}

}  // namespace internal

KVFERRY_INLINE Meeting::Meeting(asio::any_io_executor executor, std::shared_ptr<const MeetingOptions> options,
                                std::shared_ptr<kit::LinkHost> host, Descriptor socket, bool listening,
                                const AcceptEndpoint& secrets, kit::LinkHandler on_link)
    : executor_(std::move(executor)),
      options_(std::move(options)),
      host_(std::move(host)),
      dialing_(!listening),
      timer_(executor_),
      listening_(executor_),
      awaited_(listening ? Awaited::hello : Awaited::answer),
      on_link_(std::move(on_link)) {
  copy_secret(dialing_ ? secrets.dial_secret : secrets.accept_secret, own_secret_);
  copy_secret(dialing_ ? secrets.accept_secret : secrets.dial_secret, peers_secret_);
  asio::posix::stream_descriptor owned(executor_, socket.get());
  socket.release();
  if (listening) {
    listening_ = std::move(owned);
  } else {
    candidates_.push_back(std::make_shared<Candidate>(std::move(owned)));
  }
}

KVFERRY_INLINE void Meeting::begin(kit::Attempts<Meeting>& attempts, kit::Clock::time_point deadline) {
  if (!attempts.add(shared_from_this())) {
    fail(errc::closed, "the channel was closed");
    return;
  }
  std::unique_lock lock(mutex_);
  if (!on_link_) {
    return;  // it was ended meanwhile
  }
  timer_.expires_at(deadline);
  timer_.async_wait(kit::when_expired(
      weak_from_this(), [](Meeting& self) { self.fail(errc::timed_out, self.who() + " was not there in time"); }));
  if (!dialing_) {
    wait_for_connections();
    return;
  }
  try {
    check_user(candidates_.front()->socket.native_handle());
    say(Greeting::dialing);
    wait_for_bytes(candidates_.front());
  } catch (...) {
    const auto failure = kit::failure_being_handled();
    end(failure.code, who() + ": " + failure.sentence, lock);
  }
}

KVFERRY_INLINE void Meeting::Candidate::close() noexcept {
  if (socket.is_open()) {
    read_empty(socket.native_handle());
    std::error_code ignored;
    socket.close(ignored);
  }
}

KVFERRY_INLINE void Meeting::stop_listening() noexcept {
  if (listening_.is_open()) {
    refuse_all(listening_.native_handle());
    std::error_code ignored;
    listening_.close(ignored);
  }
}

KVFERRY_INLINE void Meeting::wait_for_connections() {
  listening_.async_wait(asio::posix::stream_descriptor::wait_read, [self = shared_from_this()](std::error_code ec) {
    if (!ec) {
      self->accept_one();
    }
  });
}

/// One at a time: whoever connects without end leaves turns to the thread's other work.
KVFERRY_INLINE void Meeting::accept_one() {
  std::unique_lock lock(mutex_);
  if (!on_link_ || !listening_.is_open()) {
    return;
  }
  Descriptor accepted(::accept4(listening_.native_handle(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!accepted && !would_block() && errno != ECONNABORTED) {
    end({errno, std::system_category()}, who() + ": accepting its connection", lock);
    return;
  }
  if (accepted) {
    try {
      check_user(accepted.get());
      if (candidates_.size() >= most_candidates) {
        turn_away(errc::resource_limit, "a connection that did not say whose it is gives way to a newer one");
        candidates_.front()->close();
        candidates_.pop_front();
      }
      asio::posix::stream_descriptor owned(executor_, accepted.get());
      accepted.release();
      candidates_.push_back(std::make_shared<Candidate>(std::move(owned)));
      wait_for_bytes(candidates_.back());
    } catch (...) {
      const auto failure = kit::failure_being_handled();
      turn_away(failure.code, failure.sentence);
    }
  }
  wait_for_connections();
}

KVFERRY_INLINE bool Meeting::is_allowed(std::uint32_t user) const {
  return user == ::geteuid() || std::ranges::find(options_->allowed_users, user) != options_->allowed_users.end();
}

/// @throws TransferError if the process at the other end is a stranger's.
KVFERRY_INLINE void Meeting::check_user(int descriptor) {
  const PeerProcess process = peer_process(descriptor);
  if (!is_allowed(process.user)) {
    throw TransferError(errc::authentication_failed, "process " + std::to_string(process.pid) + " is of user " +
                                                         std::to_string(process.user) +
                                                         ", which is not in allowed_users");
  }
}

KVFERRY_INLINE void Meeting::turn_away(std::error_code cause, const std::string& why) {
  options_->refusals->count(cause, "unix", why);
}

KVFERRY_INLINE void Meeting::wait_for_bytes(const std::shared_ptr<Candidate>& candidate) {
  candidate->socket.async_wait(asio::posix::stream_descriptor::wait_read,
                               [self = shared_from_this(), candidate](std::error_code ec) {
                                 if (!ec) {
                                   self->read(candidate);
                                 }
                               });
}

KVFERRY_INLINE void Meeting::read(const std::shared_ptr<Candidate>& candidate) {
  std::unique_lock lock(mutex_);
  const auto place = std::ranges::find(candidates_, candidate);
  if (!on_link_ || place == candidates_.end()) {
    return;
  }
  std::error_code cause;
  std::string why;
  try {
    while (candidate->received < candidate->bytes.size()) {
      // A hello may pass no descriptor: it has yet to show whose connection this is. Later a ring may be passed, and with the
      // welcome also the link's first descriptors.
      iovec rest{candidate->bytes.data() + candidate->received, candidate->bytes.size() - candidate->received};
      const int socket = candidate->socket.native_handle();
      const std::size_t most = awaited_ == Awaited::welcome ? tcp::PeerMemory::max_mapped : 1;
      const ssize_t got = awaited_ == Awaited::hello ? receive_bytes(socket, {&rest, 1})
                                                     : candidate->passed.receive(socket, {&rest, 1}, most);
      if (got < 0 && would_block()) {
        wait_for_bytes(candidate);
        return;
      }
      if (got == 0) {
        throw TransferError(errc::peer_closed, "its connection was closed before it was welcomed");
      }
      if (got < 0 && errno == EPROTO) {
        throw TransferError(errc::protocol_violation, "it passed descriptors that it may not pass");
      }
      if (got < 0) {
        throw TransferError({errno, std::system_category()}, "receiving on its connection before it was welcomed");
      }
      candidate->received += static_cast<std::size_t>(got);
    }
    candidate->received = 0;
    if (take(candidate) == Next::finish) {
      lock.unlock();
      finish();
    } else {
      wait_for_bytes(candidate);
    }
    return;
  } catch (...) {
    auto failure = kit::failure_being_handled();
    cause = failure.code;
    why = std::move(failure.sentence);
  }
  if (awaited_ == Awaited::hello) {
    turn_away(cause, why);
    candidates_.erase(place);
  } else {
    end(cause, who() + ": " + why, lock);
  }
}

KVFERRY_INLINE Meeting::Next Meeting::take(const std::shared_ptr<Candidate>& candidate) {
  Greeting greeting;
  std::memcpy(&greeting, candidate->bytes.data(), sizeof(greeting));
  tcp::Hello welcome;
  std::memcpy(&welcome, candidate->bytes.data(), sizeof(welcome));
  constexpr std::array<std::uint64_t, 4> magics{Greeting::dialing, Greeting::accepting, Greeting::settled,
                                                tcp::Hello::accepting};
  const bool last = awaited_ == Awaited::welcome;
  const auto version = last ? welcome.version : greeting.version;
  const auto incarnation = last ? welcome.incarnation : greeting.incarnation;
  const bool with_ring = awaited_ == Awaited::settled && greeting.magic == Greeting::settled_with_ring;
  if ((greeting.magic != magics[static_cast<std::size_t>(awaited_)] && !with_ring) ||
      version != (last ? tcp::Hello().version : Greeting().version) ||
      !equal_secrets(last ? welcome.secret : greeting.secret, peers_secret_) ||
      incarnation != host_->peer().incarnation) {
    throw TransferError(errc::authentication_failed, "its connection did not prove that it belongs to the peer");
  }
  switch (awaited_) {
    case Awaited::hello: take_hello(candidate, greeting); return Next::wait;
    case Awaited::answer:
      look_at_peer(candidate->socket.native_handle(), greeting);
      peers_reach_ = greeting.reach;
      map_ring(candidate->passed);
      if (const Descriptor own = has_rings() ? make_ring() : Descriptor()) {
        say(Greeting::settled_with_ring, own);
      } else {
        say(Greeting::settled);
      }
      awaited_ = Awaited::welcome;
      return Next::wait;
    case Awaited::settled:
      peers_reach_ = greeting.reach;
      if (with_ring && ring_.data() == nullptr) {
        throw TransferError(errc::protocol_violation, "it uses a ring that it was not passed");
      }
      if (with_ring) {
        map_ring(candidate->passed);
      } else if (ring_.data() != nullptr) {
        why_no_rings_ = "the peer uses none";
      }
      return Next::finish;
    case Awaited::welcome:
      if (has_rings() && welcome.reserved != welcome_to_rings) {
        why_no_rings_ = "the peer can't map this side's";
      }
      break;
  }
  return Next::finish;
}

KVFERRY_INLINE void Meeting::take_hello(const std::shared_ptr<Candidate>& candidate, const Greeting& hello) {
  const auto found = candidate;  // NOLINT(performance-unnecessary-copy-initialization): what it refers to goes
  look_at_peer(found->socket.native_handle(), hello);
  awaited_ = Awaited::settled;
  for (const auto& other : candidates_) {
    if (other != found) {
      other->close();
    }
  }
  candidates_.assign(1, found);
  stop_listening();
  say(Greeting::accepting, make_ring());
}

KVFERRY_INLINE Descriptor Meeting::make_ring() {
  Descriptor file;
  if (const int error = RingFile::make(ring_, file)) {
    why_no_rings_ = "this side could not make one: " + std::generic_category().message(error);
  }
  return file;
}

KVFERRY_INLINE void Meeting::map_ring(PassedDescriptors& all_passed) {
  PassedDescriptor passed = all_passed.take();
  if (!passed.file) {
    why_no_rings_ = all_passed.lost() ? "no room for the descriptor of the peer's" : "the peer passed none";
    return;
  }
  // If it is kept, it counts as one of the connection's own (`UnixSocket::descriptors`), not of those that regions need.
  passed.held = {};
  // Where this side can't read the peer's memory, large payload comes through the ring, and the kernel copies out of the file
  // in less time than out of the mapping.
  const auto keep = reach_.possible() ? MappedFile::Keep::mapping : MappedFile::Keep::file;
  const int error =
      ring_.fits(passed.file.get())
          ? MappedFile::map(std::move(passed), RingFile::bytes, peers_ring_, most_mapped_bytes(), keep)
          : EINVAL;
  why_no_rings_ = error == 0 ? "" : "mapping the peer's: " + std::generic_category().message(error);
}

KVFERRY_INLINE void Meeting::look_at_peer(int descriptor, const Greeting& greeting) {
  peer_ = peer_process(descriptor);
  memory_ = std::make_shared<ProcessMemory>(peer_.pid, options_->process_memory_threshold, options_->memory_traffic);
  if (!options_->process_memory) {
    reach_ = {Reach::switched_off};
    return;
  }
  if (peer_.pid == 0) {
    reach_ = {Reach::other_namespace};
    return;
  }
  // This process may have rights that the peer hasn't.
  if (peer_.user != ::geteuid()) {
    reach_ = {Reach::other_user};
    return;
  }
  peers_memory_ = open_memory(peer_.pid, peer_.user, greeting.proof_address);
  reach_ =
      peers_memory_ ? memory_->try_to_read(peers_memory_, greeting.proof) : Reach{static_cast<std::uint32_t>(errno)};
  if (!reach_.possible()) {
    peers_memory_ = {};
  }
}

/// The first bytes on a connection always fit.
KVFERRY_INLINE void Meeting::say(std::uint64_t magic, const Descriptor& passed) {
  Greeting greeting;
  greeting.magic = magic;
  greeting.reach = reach_;
  greeting.incarnation = options_->incarnation;
  greeting.secret = own_secret_;
  greeting.proof_address = reinterpret_cast<std::uintptr_t>(proof_of_memory().data());
  greeting.proof = proof_of_memory();
  const int socket = candidates_.front()->socket.native_handle();
  iovec piece{&greeting, sizeof(greeting)};
  const int number = passed.get();
  ssize_t sent = number == -1 ? ::send(socket, &greeting, sizeof(greeting), MSG_DONTWAIT | MSG_NOSIGNAL)
                              : send_with(socket, {&piece, 1}, {&number, 1});
  if (sent < 0 && number != -1 && errno == ETOOMANYREFS) {
    why_no_rings_ = std::generic_category().message(errno);  // this user has too many on their way
    ring_ = RingFile();
    say(magic == Greeting::settled_with_ring ? Greeting::settled : magic);
    return;
  }
  if (sent != ssize_t{sizeof(greeting)}) {
    throw TransferError({errno, std::system_category()}, "greeting it");
  }
}

KVFERRY_INLINE std::string Meeting::path() const {
  const std::string otherwise = has_rings() ? "by the rings (" : "by the socket (";
  const std::string in = reach_.possible() ? "read by process_vm_readv" : otherwise + reach_.reason() + ")";
  const std::string out = peers_reach_.possible() ? "by process_vm_readv" : otherwise + peers_reach_.reason() + ")";
  return "shm process " + std::to_string(peer_.pid) + ", received " + in + ", sent " + out +
         (has_rings() ? ", headers by rings" : ", headers by the socket (no rings: " + why_no_rings_ + ")");
}

KVFERRY_INLINE std::shared_ptr<tcp::TcpLink> Meeting::make_link() {
  const std::lock_guard lock(mutex_);
  tcp::TcpLink::Options options = options_->link;
  options.path = path();
  options.lane.memory = memory_;
  Candidate& found = *candidates_.front();
  std::unique_ptr<ByteRings> rings;
  if (has_rings()) {
    rings = std::make_unique<ByteRings>(std::move(ring_), std::move(peers_ring_));
  }
  // Owned by the one or the other all the time: there may be no memory for the socket.
  Descriptor descriptor(found.socket.release());
  const auto socket =
      std::make_shared<UnixSocket>(descriptor.get(), std::exchange(peers_memory_, {}), std::move(found.passed),
                                   std::move(rings), dialing_ ? 0 : sizeof(tcp::Hello));
  descriptor.release();
  memory_->begin(socket, reach_.possible(), options_->process_memory && peers_reach_.possible());
  const std::string remote = "process " + std::to_string(peer_.pid);
  std::vector<tcp::Lane::Connection> connections;
  connections.push_back({executor_, socket, "process " + std::to_string(::getpid()), remote});
  return tcp::TcpLink::create(host_, std::move(connections), options);
}

KVFERRY_INLINE void Meeting::finish() {
  kit::LinkHandler on_link;
  {
    const std::lock_guard lock(mutex_);
    on_link = std::exchange(on_link_, {});
    timer_.cancel();
  }
  if (!on_link) {
    return;
  }
  std::shared_ptr<tcp::TcpLink> link;
  try {
    link = make_link();
  } catch (...) {
    auto failure = kit::failure_being_handled();
    on_link(failure.code, nullptr, who() + ": " + failure.sentence);
    return;
  }
  const bool with_rings = has_rings();
  const bool fast = reach_.possible() && peers_reach_.possible();
  options_->logger->log(fast ? LogLevel::info : LogLevel::warning, "path_chosen", host_->peer().id, {},
                        [&] { return "payload: " + link->path(); });
  // Handed over first, and welcomed then: see tcp::DataAcceptor.
  on_link({}, link, {});
  if (dialing_) {
    link->run();
    return;
  }
  tcp::Hello welcome;
  welcome.magic = tcp::Hello::accepting;
  welcome.incarnation = options_->incarnation;
  welcome.secret = own_secret_;
  welcome.reserved = with_rings ? welcome_to_rings : 0;
  link->run(welcome);
}

KVFERRY_INLINE void Meeting::fail(std::error_code cause, std::string why) {
  std::unique_lock lock(mutex_);
  end(cause, std::move(why), lock);
}

KVFERRY_INLINE void Meeting::end(std::error_code cause, std::string why, std::unique_lock<std::mutex>& lock) {
  auto on_link = std::exchange(on_link_, {});
  if (!on_link) {
    return;
  }
  timer_.cancel();
  stop_listening();
  for (const auto& candidate : candidates_) {
    candidate->close();
  }
  candidates_.clear();
  lock.unlock();
  on_link(cause, nullptr, std::move(why));
}

KVFERRY_INLINE std::string Meeting::who() const { return "peer " + in_quotes(host_->peer().id); }

}  // namespace kvferry::shm
