// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/data_acceptor.hpp>

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
#include <kvferry/detail/text.hpp>
#include <kvferry/kit/failure.hpp>
#include <kvferry/tcp/data_connection.hpp>
#include <kvferry/tcp/open_socket.hpp>
#include <kvferry/tcp/system_code.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

using asio::ip::tcp;

inline constexpr std::size_t max_expected = std::size_t{1} << 14;

/// A connection that has not said its hello costs a descriptor.
KVFERRY_INLINE std::size_t max_greetings() { return share_of_descriptors(4, 16, 4096); }
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
  std::size_t openings = 0;  ///< How many connections have begun to agree on keys by it, those that ended included.
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
  bool postponed = false;        ///< It waits for a turn, before keys are agreed with it ...
  bool has_turn = false;         ///< ... and has had it.
  std::weak_ptr<Expected> waits_for;                           ///< Whose turn that is.
  std::list<std::shared_ptr<Greeting>>::const_iterator place;  ///< Among the greetings.
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
      accept_pause_(executor),
      next_turn_(executor) {}

KVFERRY_INLINE void DataAcceptor::listen(const std::string& host, std::uint16_t port,
                                         std::chrono::milliseconds lookup_timeout, std::uint16_t left_free) {
  const HostPort address = kit::listening_address({host, port}, lookup_timeout);
  const std::unique_lock lock(mutex_);
  auto ec = listen_at(acceptor_, address);
  std::error_code ignored;
  if (!ec && port == 0 && left_free != 0 && acceptor_.local_endpoint(ignored).port() == left_free) {
    // As long as the one that was got is in use, the next is another. Where there is no other, the one who comes later says so.
    tcp::acceptor got = std::exchange(acceptor_, tcp::acceptor(executor_));
    if (listen_at(acceptor_, address)) {
      acceptor_ = std::move(got);
    }
  }
  if (ec) {
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
  std::list<std::shared_ptr<Expected>> entry{expected};
  expected->timer.expires_at(deadline);
  expected->timer.async_wait([self = shared_from_this(), weak = std::weak_ptr(expected)](std::error_code ec) {
    const auto late = weak.lock();
    if (late && ec != asio::error::operation_aborted) {
      self->give_up(late);
    }
  });
  expected_.splice(expected_.end(), entry);  // not without a deadline
  lock.unlock();
  try {
    expected->host->when_abandoned([weak = weak_from_this(), waiting = std::weak_ptr(expected)] {
      const auto self = weak.lock();
      if (const auto abandoned = waiting.lock(); self && abandoned) {
        self->abandon(abandoned);
      }
    });
  } catch (...) {
    abandon(expected);
    throw;
  }
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
    try {
      if (ec && ec != std::errc::operation_would_block && ec != std::errc::interrupted) {
        self->accept_later();
        return;
      }
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

/// Out of descriptors or memory, or a connection that was gone before it was accepted: another try, but no busy loop.
KVFERRY_INLINE void DataAcceptor::accept_later() {
  accept_pause_.expires_after(accept_pause);
  accept_pause_.async_wait([self = shared_from_this()](std::error_code aborted) {
    const std::lock_guard lock(self->mutex_);
    self->accepts_ = false;
    if (aborted || self->closed_) {
      return;
    }
    try {
      self->accept_next();
    } catch (const std::exception&) {
      detail::log_exception("when data connections were waited for");
    }
  });
  accepts_ = true;
}

KVFERRY_INLINE void DataAcceptor::abandon(const std::shared_ptr<Expected>& expected) {
  const std::lock_guard lock(mutex_);
  if (std::erase(expected_, expected) != 0) {
    expected->timer.cancel();
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

KVFERRY_INLINE void DataAcceptor::close() {
  std::list<std::shared_ptr<Expected>> expected;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    std::error_code ignored;
    acceptor_.close(ignored);
    accept_pause_.cancel();
    next_turn_.cancel();
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
