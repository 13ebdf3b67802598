// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/data_acceptor.hpp>

#include <asio/buffer.hpp>
#include <asio/ip/v6_only.hpp>

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <optional>
#include <string_view>
#include <utility>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>
#include <kvferry/url.hpp>

#include <kvferry/detail/descriptor_limit.hpp>
#include <kvferry/detail/host_address.hpp>
#include <kvferry/detail/name_resolution.hpp>
#include <kvferry/detail/source_address.hpp>
#include <kvferry/detail/text.hpp>
#include <kvferry/kit/failure.hpp>
#include <kvferry/tcp/data_connection.hpp>
#include <kvferry/tcp/open_socket.hpp>
#include <kvferry/tcp/system_code.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

using asio::ip::tcp;

/// Connections that a source may have beyond those that its handshakes have announced.
inline constexpr std::size_t unannounced_greetings = 64;
inline constexpr std::size_t max_expected = std::size_t{1} << 14;

/// A connection that has not said its hello costs a descriptor.
KVFERRY_INLINE std::size_t max_greetings() { return share_of_descriptors(4, 16, 4096); }
/// A peer of this project's has the end of TLS's handshake and its hello under way when its certificate is refused: a few KiB.
inline constexpr std::size_t max_past_refusal = std::size_t{64} << 10;
/// How long accepting rests when the process is out of file descriptors.
inline constexpr std::chrono::milliseconds accept_pause{100};

/// An IPv6 wildcard takes connections of both families, whatever the system's default (net.ipv6.bindv6only): peers
/// reach it at either address, as they do the handshake's.
KVFERRY_INLINE std::error_code listen_at(tcp::acceptor& acceptor, const tcp::endpoint& endpoint) {
  std::error_code ec;
  open_socket(acceptor, endpoint.protocol(), ec);
  if (!ec) {
    acceptor.set_option(tcp::acceptor::reuse_address(true), ec);
  }
  if (!ec && endpoint.protocol() == tcp::v6()) {
    acceptor.set_option(asio::ip::v6_only(!endpoint.address().is_unspecified()), ec);
  }
  if (!ec) {
    acceptor.bind(endpoint, ec);
  }
  if (!ec) {
    acceptor.listen(tcp::acceptor::max_listen_connections, ec);
  }
  if (!ec) {
    acceptor.non_blocking(true, ec);
  }
  if (ec) {
    std::error_code ignored;
    acceptor.close(ignored);
  }
  return ec;
}

KVFERRY_INLINE std::error_code listen_at(tcp::acceptor& acceptor, const HostPort& address) {
  if (address.host == "*") {
    // On a system without IPv6 there is only the other one.
    return listen_at(acceptor, {tcp::v6(), address.port}) ? listen_at(acceptor, {tcp::v4(), address.port})
                                                          : std::error_code();
  }
  std::error_code ec;
  const auto number = address_of(address.host);
  const auto zoned = zone_of(address.host).empty() ? asio::ip::address() : asio::ip::make_address(address.host, ec);
  return ec || !number ? std::make_error_code(std::errc::address_not_available)
                       : listen_at(acceptor, {zone_of(address.host).empty() ? *number : zoned, address.port});
}

}  // namespace internal

/// A handshake whose connections are on their way.
struct DataAcceptor::Expected {
  Expected(const asio::any_io_executor& executor, std::size_t lanes) : connections(lanes), timer(executor) {}

  std::shared_ptr<kit::LinkHost> host;
  kit::LinkHandler on_link;
  Secret dial_secret = random_secret();
  Secret accept_secret = random_secret();
  std::optional<TlsKey> tls_key;  ///< None: its connections are not encrypted.
  std::vector<std::optional<DataConnection>> connections;
  std::size_t arrived = 0;
  asio::steady_timer timer;
};

/// A connection that has proved nothing yet.
struct DataAcceptor::Greeting {
  Greeting(tcp::socket accepted, std::string from)
      : connection{std::move(accepted)}, source(std::move(from)), timer(connection.socket.get_executor()) {}

  DataConnection connection;
  const std::string source;
  std::vector<std::byte> opening;  ///< Of TLS, until there is enough of it.
  std::array<std::byte, sizeof(Hello)> bytes{};
  std::size_t received = 0;
  asio::steady_timer timer;
  /// A thread is at its connection, without the acceptor's mutex. Nobody else may be then.
  bool busy = false;
  /// It isn't one of the greetings any more: admitted, or dropped, and then the thread that is at it closes it.
  bool gone = false;
  bool comes_again = false;      ///< It is told so first.
  bool refused = false;          ///< It is being told what is wrong with its certificate, and has said since then ...
  std::size_t past_refusal = 0;  ///< ... so many bytes.
};

KVFERRY_INLINE DataAcceptor::DataAcceptor(const asio::any_io_executor& executor, LinkOptions options,
                                          std::shared_ptr<kit::Refusals> refusals)
    : executor_(executor),
      options_(std::move(options)),
      refusals_(std::move(refusals)),
      max_greetings_(max_greetings()),
      acceptor_(executor),
      accept_pause_(executor) {}

KVFERRY_INLINE void DataAcceptor::listen(const std::string& host, std::uint16_t port,
                                         std::chrono::milliseconds lookup_timeout) {
  const HostPort address = kit::listening_address({host, port}, lookup_timeout);
  const std::unique_lock lock(mutex_);
  if (const auto ec = listen_at(acceptor_, address)) {
    throw TransferError(system_code(ec), "data connections: cannot listen at " + HostPort{host, port}.to_string());
  }
  accept_next();
}

KVFERRY_INLINE std::uint16_t DataAcceptor::port() const {
  const std::lock_guard lock(mutex_);
  std::error_code ec;
  return acceptor_.local_endpoint(ec).port();
}

KVFERRY_INLINE AcceptEndpoint DataAcceptor::expect(std::shared_ptr<kit::LinkHost> host, std::size_t lanes,
                                                   kit::Clock::time_point deadline, kit::LinkHandler on_link,
                                                   const CertificateHash& certificate) {
  auto expected = std::make_shared<Expected>(executor_, lanes);
  expected->host = std::move(host);
  expected->on_link = std::move(on_link);
  AcceptEndpoint endpoint;
  endpoint.lanes = lanes;
  endpoint.dial_secret.assign(expected->dial_secret.begin(), expected->dial_secret.end());
  endpoint.accept_secret.assign(expected->accept_secret.begin(), expected->accept_secret.end());
  endpoint.port = port();
  if (options_.tls) {
    expected->tls_key = random_tls_key();
    endpoint.tls_identity.emplace(expected->tls_key->identity.begin(), expected->tls_key->identity.end());
    if (options_.certificates) {
      expected->tls_key->certificates = options_.certificates->current();
      expected->tls_key->peers_certificate = certificate;
      const CertificateHash& own = expected->tls_key->certificates->hash();
      endpoint.certificate.emplace(own.begin(), own.end());
    } else {
      endpoint.tls_secret.emplace(expected->tls_key->secret.begin(), expected->tls_key->secret.end());
    }
  }

  std::unique_lock lock(mutex_);
  if (closed_ || expected_.size() >= max_expected) {
    throw TransferError(closed_ ? errc::closed : errc::resource_limit,
                        std::to_string(expected_.size()) + " handshakes await their data connections");
  }
  if (!accepts_ && acceptor_.is_open()) {
    accept_next();
  }
  expected_.push_back(expected);
  expected->timer.expires_at(deadline);
  expected->timer.async_wait([self = shared_from_this(), weak = std::weak_ptr(expected)](std::error_code ec) {
    const auto late = weak.lock();
    if (late && ec != asio::error::operation_aborted) {
      self->give_up(late);
    }
  });
  lock.unlock();
  expected->host->when_abandoned([weak = weak_from_this(), waiting = std::weak_ptr(expected)] {
    const auto self = weak.lock();
    if (const auto abandoned = waiting.lock(); self && abandoned) {
      self->abandon(abandoned);
    }
  });
  return endpoint;
}

KVFERRY_INLINE void DataAcceptor::give_up(const std::shared_ptr<Expected>& expected) {
  {
    const std::lock_guard lock(mutex_);
    if (std::erase(expected_, expected) == 0) {
      return;
    }
  }
  expected->on_link(errc::timed_out, nullptr,
                    "peer " + in_quotes(expected->host->peer().id) + " made " + std::to_string(expected->arrived) +
                        " of " + std::to_string(expected->connections.size()) + " data connections in time");
}

KVFERRY_INLINE void DataAcceptor::accept_next() {
  acceptor_.async_wait(tcp::acceptor::wait_read, [self = shared_from_this()](std::error_code ec) {
    const std::unique_lock lock(self->mutex_);
    self->accepts_ = false;
    if (self->closed_) {
      return;
    }
    tcp::socket socket(self->executor_);
    if (!ec) {
      try {
        socket = accept_socket(self->acceptor_, ec);
      } catch (const std::exception&) {
        ec = std::make_error_code(std::errc::not_enough_memory);
      }
    }
    if (ec && ec != std::errc::operation_would_block && ec != std::errc::interrupted) {
      // Out of descriptors or memory, or a connection that was gone before it was accepted: another try, but no busy
      // loop.
      self->accept_pause_.expires_after(accept_pause);
      self->accept_pause_.async_wait([self](std::error_code aborted) {
        const std::lock_guard relock(self->mutex_);
        self->accepts_ = false;
        if (!aborted && !self->closed_) {
          self->accept_next();
        }
      });
      self->accepts_ = true;
      return;
    }
    try {
      self->accept_next();  // first: there may be no memory to see to this one
      if (!ec) {
        self->greet(std::move(socket));
      }
    } catch (const std::exception&) {
      detail::log_exception("when a data connection was accepted");
    }
  });
  accepts_ = true;
}

KVFERRY_INLINE void DataAcceptor::greet(tcp::socket socket) {
  std::error_code ec;
  prepare_socket(socket, options_.socket, ec);
  if (ec) {
    return;
  }
  const auto from = socket.remote_endpoint(ec);
  if (ec) {
    return;
  }
  auto greeting = std::make_shared<Greeting>(std::move(socket), source_of(*from.data()));
  make_room(greeting->source);
  greetings_.push_back(greeting);
  try {
    ++greetings_of_[greeting->source];
    greeting->timer.expires_after(options_.hello_timeout);
    greeting->timer.async_wait([self = shared_from_this(), weak = std::weak_ptr(greeting)](std::error_code aborted) {
      const std::lock_guard lock(self->mutex_);
      // Whoever took it away meanwhile could not cancel this any more.
      if (const auto late = weak.lock(); late && !aborted && !late->gone) {
        if (!late->refused) {
          kit::if_memory_lasts([&] {
            self->refusals_->count(errc::timed_out, late->source, "a data connection didn't say its hello in time");
          });
        }
        self->drop(late);
      }
    });
    wait_for_hello(greeting);
  } catch (...) {
    drop(greeting);  // memory is used up
    throw;
  }
}

/// Lets go of the oldest that waits, of a source that has its share or of the one that has most, if there are too many.
KVFERRY_INLINE void DataAcceptor::make_room(const std::string& source) {
  const auto announced = [this](const std::string& from) {
    std::size_t lanes = 0;
    for (const auto& expected : expected_) {
      lanes += expected->host->peer().source == from ? expected->connections.size() - expected->arrived : 0;
    }
    return lanes;
  };
  const std::string* greedy = nullptr;
  const auto own = greetings_of_.find(source);
  if (own != greetings_of_.end() && own->second >= unannounced_greetings &&
      own->second >= unannounced_greetings + announced(source)) {
    greedy = &source;
  } else if (greetings_.size() >= max_greetings_) {
    greedy = &std::ranges::max_element(greetings_of_, {}, [](const auto& one) { return one.second; })->first;
  }
  if (greedy == nullptr) {
    return;
  }
  const auto oldest = std::ranges::find(greetings_, *greedy, &Greeting::source);
  refusals_->count(errc::resource_limit, *greedy, "a data connection without a hello had to make room for a newer one");
  // Whoever it is, if it means it, comes again.
  (*oldest)->comes_again = true;
  drop(*oldest);
}

KVFERRY_INLINE void DataAcceptor::tell_to_come_again(DataConnection& connection) const {
  Hello again;
  again.magic = Hello::come_again;
  again.incarnation = options_.incarnation;
  std::error_code ignored;
  // What is unread when a socket is closed makes the kernel drop what was written.
  std::array<std::byte, max_tls_opening> unread;
  if (connection.tls && !connection.tls->shaken()) {
    // Within TLS's handshake there is nothing to be said: reset, it comes again as well.
    connection.socket.set_option(asio::socket_base::linger(true, 0), ignored);
  } else {
    (void)connection.read_some(unread, ignored);
    connection.write(std::as_bytes(std::span(&again, 1)), ignored);
  }
}

KVFERRY_INLINE void DataAcceptor::forget(const std::shared_ptr<Greeting>& greeting) {
  greeting->gone = true;
  greetings_.remove(greeting);
  const auto of_source = greetings_of_.find(greeting->source);
  // There was no memory to count it by, perhaps.
  if (of_source != greetings_of_.end() && --of_source->second == 0) {
    greetings_of_.erase(of_source);
  }
}

KVFERRY_INLINE void DataAcceptor::abandon(const std::shared_ptr<Expected>& expected) {
  const std::lock_guard lock(mutex_);
  if (std::erase(expected_, expected) != 0) {
    expected->timer.cancel();
  }
}

KVFERRY_INLINE void DataAcceptor::wait_for_hello(const std::shared_ptr<Greeting>& greeting) {
  greeting->connection.socket.async_wait(greeting->connection.next_event(),
                                         [self = shared_from_this(), greeting](std::error_code ec) {
                                           if (!ec) {
                                             self->read_hello(greeting);
                                           }
                                         });
}

KVFERRY_INLINE void DataAcceptor::read_hello(const std::shared_ptr<Greeting>& greeting) {
  std::unique_lock lock(mutex_);
  if (closed_ || !greeting->connection.socket.is_open()) {
    return;
  }
  std::error_code ec;
  // Agreeing on keys takes a while, for which nobody else has to wait.
  greeting->busy = true;
  lock.unlock();
  try {
    ec = receive_hello(*greeting);
  } catch (const std::exception&) {
    ec = errc::resource_limit;  // memory is used up
  }
  lock.lock();
  greeting->busy = false;
  if (greeting->gone) {
    close(*greeting);
    return;
  }
  if (ec == asio::error::would_block || ec == asio::error::try_again) {
    wait_for_hello(greeting);
  } else if (ec) {
    if (ec == errc::authentication_failed) {
      refuse(greeting);
    } else {
      drop(greeting);
    }
  } else {
    admit(greeting, lock);
  }
}

KVFERRY_INLINE void DataAcceptor::refuse(const std::shared_ptr<Greeting>& greeting) {
  refusals_->count(errc::authentication_failed, greeting->source, why_refused(*greeting));
  const auto& connection = greeting->connection;
  if (!connection.tls || !connection.tls->refuses_certificate()) {
    drop(greeting);
    return;
  }
  // Its hello is on its way. A socket that is closed with that unread resets the connection, and what was said may be lost.
  std::error_code ignored;
  greeting->refused = true;
  greeting->connection.socket.shutdown(tcp::socket::shutdown_send, ignored);
  wait_for_hello(greeting);
}

KVFERRY_INLINE std::string DataAcceptor::why_refused(const Greeting& greeting) const {
  const auto& tls = greeting.connection.tls;
  const std::string why = tls ? tls->why() : std::string();
  if (why.empty()) {
    return options_.certificates ? "a data connection is of no handshake, or not with certificates"
                                 : "a data connection isn't encrypted with the key of a handshake";
  }
  const auto expected = std::ranges::find_if(expected_, [&tls](const auto& candidate) {
    return candidate->tls_key && candidate->tls_key->identity == tls->identity();
  });
  return "a data connection of " +
         (expected == expected_.end() ? "a peer that has given up"
                                      : "peer " + in_quotes((*expected)->host->peer().id)) +
         ": " + why;
}

KVFERRY_INLINE std::error_code DataAcceptor::receive_hello(Greeting& greeting) {
  DataConnection& connection = greeting.connection;
  if (greeting.refused) {
    return read_past_refusal(greeting);
  }
  if (options_.tls) {
    if (const auto ec = connection.tls ? std::error_code() : receive_opening(greeting)) {
      return ec;
    }
    if (const auto ec = connection.tls->shake_hands()) {
      return ec;
    }
  }
  std::error_code ec;
  while (!ec && greeting.received < greeting.bytes.size()) {
    greeting.received += connection.read_some(std::span(greeting.bytes).subspan(greeting.received), ec);
  }
  return ec;
}

/// One piece each time: whoever says more and more must not keep the thread from others, nor from what has become of the
/// connection meanwhile.
KVFERRY_INLINE std::error_code DataAcceptor::read_past_refusal(Greeting& greeting) {
  std::array<std::byte, max_past_refusal / 4> unread;
  std::error_code ec;
  greeting.past_refusal += greeting.connection.socket.read_some(asio::buffer(unread), ec);
  if (ec) {
    return ec;
  }
  return greeting.past_refusal > max_past_refusal ? make_error_code(errc::resource_limit)
                                                  : std::error_code(asio::error::would_block);
}

/// Nothing is set aside for a connection before it has said what TLS's begin with. Who then shows no key of a
/// handshake's is turned away before keys are agreed with him.
KVFERRY_INLINE std::error_code DataAcceptor::receive_opening(Greeting& greeting) {
  for (;;) {
    std::size_t length = 0;
    switch (look_at_tls_opening(greeting.opening, length)) {
      case TlsOpening::none: return errc::authentication_failed;
      case TlsOpening::incomplete: break;
      case TlsOpening::whole:
        greeting.connection.tls = options_.tls->accept(
            greeting.connection.socket.native_handle(), greeting.opening,
            [this](std::span<const std::byte> identity) -> std::optional<TlsKey> {
              const std::lock_guard lock(mutex_);
              const auto expected = std::ranges::find_if(expected_, [identity](const auto& candidate) {
                return candidate->tls_key && std::ranges::equal(candidate->tls_key->identity, identity);
              });
              return expected == expected_.end() ? std::nullopt : (*expected)->tls_key;
            });
        std::vector<std::byte>().swap(greeting.opening);
        return {};
    }
    const std::size_t had = greeting.opening.size();
    greeting.opening.resize(length);
    std::error_code ec;
    const std::size_t received =
        greeting.connection.read_some(std::span(greeting.opening).subspan(had), ec);
    greeting.opening.resize(had + received);
    if (ec) {
      return ec;
    }
  }
}

KVFERRY_INLINE void DataAcceptor::admit(const std::shared_ptr<Greeting>& greeting, std::unique_lock<std::mutex>& lock) {
  Hello hello;
  std::memcpy(&hello, greeting->bytes.data(), sizeof(hello));
  greeting->timer.cancel();
  const auto expected = std::ranges::find_if(expected_, [&](const std::shared_ptr<Expected>& candidate) {
    return equal_secrets(candidate->dial_secret, hello.secret);
  });
  const bool known = hello.magic == Hello::dialing && hello.version == Hello().version && expected != expected_.end() &&
                     hello.incarnation == (*expected)->host->peer().incarnation &&
                     hello.lane_count == (*expected)->connections.size() && hello.lane < hello.lane_count &&
                     !(*expected)->connections[hello.lane] &&
                     (!options_.tls || greeting->connection.tls->identity() == (*expected)->tls_key->identity);
  if (!known) {
    refusals_->count(errc::handshake_failed, greeting->source, "a data connection's hello belongs to no handshake");
    drop(greeting);
    return;
  }
  (*expected)->connections[hello.lane].emplace(std::move(greeting->connection));
  forget(greeting);
  if (++(*expected)->arrived == (*expected)->connections.size()) {
    complete(std::shared_ptr(*expected), lock);
  } else {
    bound_parts(lock);
  }
}

/// Connections of links that aren't whole cost descriptors, too: if there are too many, the oldest handshake of the
/// source that has most of them is given up.
KVFERRY_INLINE void DataAcceptor::bound_parts(std::unique_lock<std::mutex>& lock) {
  std::map<std::string_view, std::size_t> of_source;
  std::size_t all = 0;
  for (const auto& expected : expected_) {
    of_source[expected->host->peer().source] += expected->arrived;
    all += expected->arrived;
  }
  if (all <= 2 * max_greetings_) {
    return;
  }
  const auto greedy = std::ranges::max_element(of_source, {}, [](const auto& one) { return one.second; })->first;
  const auto oldest = std::ranges::find_if(expected_, [greedy](const std::shared_ptr<Expected>& expected) {
    return expected->arrived != 0 && expected->host->peer().source == greedy;
  });
  const auto given_up = *oldest;
  expected_.erase(oldest);
  given_up->timer.cancel();
  lock.unlock();
  const std::string why = "it made " + std::to_string(given_up->arrived) + " of " +
                          std::to_string(given_up->connections.size()) +
                          " data connections, and had to make room for newer ones";
  refusals_->count(errc::resource_limit, given_up->host->peer().source, why);
  given_up->on_link(errc::resource_limit, nullptr, "peer " + in_quotes(given_up->host->peer().id) + ": " + why);
}

KVFERRY_INLINE void DataAcceptor::complete(const std::shared_ptr<Expected>& expected,
                                           std::unique_lock<std::mutex>& lock) {
  expected_.remove(expected);
  expected->timer.cancel();
  lock.unlock();

  std::shared_ptr<TcpLink> link;
  try {
    std::vector<Lane::Connection> connections;
    for (auto& connection : expected->connections) {
      connections.push_back(connection_of(std::move(connection->socket), std::move(connection->tls)));
    }
    link = TcpLink::create(expected->host, std::move(connections), options_.link);
  } catch (...) {
    auto failure = kit::failure_being_handled();
    expected->on_link(failure.code, nullptr, std::move(failure.sentence));
    return;
  }
  // Handed over first, and welcomed then: when the peer learns that it is connected, this side is ready for it. And a
  // channel that is being closed finds the link, and shuts it, before it touches a region.
  expected->on_link({}, link, {});
  Hello welcome;
  welcome.magic = Hello::accepting;
  welcome.incarnation = options_.incarnation;
  welcome.secret = expected->accept_secret;
  link->run(welcome);
}

KVFERRY_INLINE void DataAcceptor::drop(const std::shared_ptr<Greeting>& greeting) {
  // Keeps it alive where the argument is the list's own element.
  const auto dropped = greeting;  // NOLINT(performance-unnecessary-copy-initialization)
  if (dropped->gone) {
    return;
  }
  dropped->timer.cancel();
  if (!dropped->busy) {
    close(*dropped);
  }
  forget(dropped);
}

KVFERRY_INLINE void DataAcceptor::close(Greeting& greeting) const {
  if (greeting.comes_again) {
    tell_to_come_again(greeting.connection);
  }
  greeting.connection.close();
}

KVFERRY_INLINE void DataAcceptor::close() {
  std::list<std::shared_ptr<Expected>> expected;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    std::error_code ignored;
    acceptor_.close(ignored);
    accept_pause_.cancel();
    while (!greetings_.empty()) {
      drop(greetings_.front());
    }
    expected.swap(expected_);
    for (const auto& unfinished : expected) {
      unfinished->timer.cancel();
    }
  }
  for (const auto& unfinished : expected) {
    unfinished->on_link(errc::closed, nullptr, "the channel was closed");
  }
}

}  // namespace kvferry::tcp
