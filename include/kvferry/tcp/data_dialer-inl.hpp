// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/data_dialer.hpp>

#include <asio/post.hpp>

#include <algorithm>
#include <cstring>
#include <new>
#include <span>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/url.hpp>

#include <kvferry/detail/text.hpp>
#include <kvferry/kit/failure.hpp>
#include <kvferry/kit/weak_calls.hpp>
#include <kvferry/tcp/data_connection.hpp>
#include <kvferry/tcp/open_socket.hpp>
#include <kvferry/tcp/system_code.hpp>
#include <kvferry/tcp/tcp_link.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

using asio::ip::tcp;

inline namespace internal {

/// Before a connection is made again that the peer had no room for.
inline constexpr std::chrono::milliseconds again_pause{20};
/// After so many a lane gives up: there may be no crowd, but somebody in between who lets nothing through.
inline constexpr std::size_t most_resets = 10;

}  // namespace internal

struct DataDialer::LaneDial {
  LaneDial(const asio::any_io_executor& executor, std::size_t lane)
      : number(lane), connection{tcp::socket(executor)}, again(executor) {}

  const std::size_t number;
  DataConnection connection;
  bool begun = false;
  tcp::endpoint to;
  asio::steady_timer again;
  std::size_t resets = 0;
  std::array<std::byte, sizeof(Hello)> bytes{};
  std::size_t received = 0;
};

KVFERRY_INLINE DataDialer::DataDialer(const asio::any_io_executor& executor, LinkOptions options,
                                      std::shared_ptr<kit::LinkHost> host, AcceptEndpoint endpoint,
                                      std::shared_ptr<kit::NameLookups> lookups, kit::LinkHandler on_link,
                                      std::shared_ptr<const TlsCertificates> certificates)
    : executor_(executor),
      options_(std::move(options)),
      host_(std::move(host)),
      endpoint_(std::move(endpoint)),
      certificates_(std::move(certificates)),
      lookups_(std::move(lookups)),
      on_link_(std::move(on_link)),
      timer_(executor) {}

KVFERRY_INLINE std::string DataDialer::where() const {
  return "data connection to peer " + in_quotes(host_->peer().id) + " at " +
         HostPort{endpoint_.host, static_cast<std::uint16_t>(endpoint_.port)}.to_string();
}

KVFERRY_INLINE void DataDialer::dial(kit::Clock::time_point deadline) {
  const std::lock_guard lock(mutex_);
  if (!on_link_) {
    return;  // it was ended meanwhile
  }
  timer_.expires_at(deadline);
  timer_.async_wait(kit::when_expired(
      weak_from_this(), [](DataDialer& self) { self.fail(errc::timed_out, self.where() + " was not there in time"); }));
  for (std::size_t i = 0; i < endpoint_.lanes; ++i) {
    lanes_.push_back(std::make_shared<LaneDial>(executor_, i));
  }
  std::error_code ec;
  if (const auto address = asio::ip::make_address(endpoint_.host, ec); !ec) {
    for (const auto& lane : lanes_) {
      connect(lane, {address, static_cast<std::uint16_t>(endpoint_.port)});
    }
    return;
  }
  lookups_->look_up(
      endpoint_.host, deadline,
      [self = shared_from_this()](std::error_code failed, const std::vector<asio::ip::address>& addresses) mutable {
        const auto executor = self->executor_;
        // Moved, so that the lookup's thread is never the last to hold a dialer.
        asio::post(executor, [self = std::move(self), failed, addresses] { self->found(failed, addresses); });
      });
}

KVFERRY_INLINE void DataDialer::found(std::error_code ec, const std::vector<asio::ip::address>& addresses) {
  if (ec) {
    fail(ec, where() + ": " + ec.message());
    return;
  }
  std::vector<tcp::endpoint> candidates;
  candidates.reserve(addresses.size());
  for (const auto& address : addresses) {
    candidates.emplace_back(address, static_cast<std::uint16_t>(endpoint_.port));
  }
  const std::lock_guard lock(mutex_);
  if (on_link_) {
    race_ = std::make_shared<AddressRace>(executor_, std::move(candidates),
                                          [self = shared_from_this()](std::error_code failed, tcp::socket socket) {
                                            self->race_ended(failed, std::move(socket));
                                          });
    race_->start();
  }
}

KVFERRY_INLINE void DataDialer::race_ended(std::error_code ec, tcp::socket socket) {
  std::shared_ptr<LaneDial> first;
  tcp::endpoint winner;
  if (!ec) {
    winner = socket.remote_endpoint(ec);
  }
  if (ec) {
    fail(ec, where() + ": " + ec.message());
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    if (!on_link_) {
      return;
    }
    first = lanes_.front();
    first->connection.socket = std::move(socket);
    first->to = winner;
    for (std::size_t i = 1; i < lanes_.size(); ++i) {
      connect(lanes_[i], winner);
    }
  }
  greet(first);
}

KVFERRY_INLINE void DataDialer::connect(const std::shared_ptr<LaneDial>& lane, const tcp::endpoint& to) {
  const auto connected = [self = shared_from_this(), lane](std::error_code ec) {
    if (ec) {
      self->fail(ec, self->where() + ": " + ec.message());
    } else {
      self->greet(lane);
    }
  };
  std::error_code ec;
  lane->to = to;
  open_socket(lane->connection.socket, to.protocol(), ec);
  if (ec) {
    asio::post(executor_, [connected, ec] { connected(ec); });  // not in this call, whose caller holds the mutex
  } else {
    lane->connection.socket.async_connect(to, connected);
  }
}

/// Whether this may be what becomes of a connection that was told to come again before its hello had arrived: the
/// kernel then resets it, and what it was told may be lost.
KVFERRY_INLINE bool DataDialer::may_be_a_crowd(LaneDial& lane, std::error_code ec) {
  const auto cause = system_code(ec);
  return (cause == std::errc::connection_reset || cause == std::errc::broken_pipe) && ++lane.resets <= most_resets;
}

/// Whether these are the first bytes of what is said, unencrypted, before TLS's handshake by who has no room for it.
KVFERRY_INLINE bool DataDialer::was_told_to_come_again(const LaneDial& lane) {
  const auto said = lane.connection.tls->first_received();
  return !said.empty() && std::memcmp(said.data(), &Hello::come_again, said.size()) == 0;
}

KVFERRY_INLINE void DataDialer::begin(LaneDial& lane, std::error_code& ec) {
  prepare_socket(lane.connection.socket, options_.socket, ec);
  if (ec || !endpoint_.tls_identity) {
    return;
  }
  TlsKey key;
  std::ranges::copy(*endpoint_.tls_identity, key.identity.begin());
  if (certificates_) {
    key.certificates = certificates_;
    std::ranges::copy(*endpoint_.certificate, key.peers_certificate.begin());
  } else {
    std::ranges::copy(*endpoint_.tls_secret, key.secret.begin());
  }
  try {
    lane.connection.tls = options_.tls->dial(lane.connection.socket.native_handle(), key);
  } catch (const std::bad_alloc&) {
    ec = errc::resource_limit;
  }
}

KVFERRY_INLINE void DataDialer::send_hello(LaneDial& lane, std::error_code& ec) const {
  Hello hello;
  hello.lane = static_cast<std::uint32_t>(lane.number);
  hello.lane_count = static_cast<std::uint32_t>(lanes_.size());
  hello.incarnation = options_.incarnation;
  std::ranges::copy(endpoint_.dial_secret, hello.secret.begin());
  lane.connection.write(std::as_bytes(std::span(&hello, 1)), ec);
}

KVFERRY_INLINE void DataDialer::greet(const std::shared_ptr<LaneDial>& lane) {
  std::error_code ec;
  std::string why;
  {
    const std::lock_guard lock(mutex_);
    if (!on_link_) {
      return;
    }
    if (!std::exchange(lane->begun, true)) {
      begin(*lane, ec);
    }
    TlsStream* const tls = lane->connection.tls.get();
    if (!ec && tls != nullptr) {
      ec = tls->shake_hands();
      if (ec == asio::error::would_block) {
        when_readable(lane, &DataDialer::greet);
        return;
      }
    }
    if (!ec) {
      send_hello(*lane, ec);
    }
    if (!ec) {
      when_readable(lane, &DataDialer::read_welcome);
      return;
    }
    if (may_be_a_crowd(*lane, ec) || (tls != nullptr && was_told_to_come_again(*lane))) {
      come_again(lane);
      return;
    }
    why = tls == nullptr ? std::string() : tls->why();
  }
  if (ec == asio::error::eof) {
    fail(errc::peer_closed, where() + " was closed within TLS's handshake");
  } else if (ec == errc::authentication_failed && certificates_) {
    fail(ec, where() + ": " + (why.empty() ? "it isn't encrypted with the certificate that the peer has told" : why));
  } else if (ec == errc::authentication_failed) {
    fail(ec, where() + " isn't encrypted with the key that the peer has told");
  } else {
    fail(ec, where() + ": " + ec.message());
  }
}

KVFERRY_INLINE void DataDialer::when_readable(const std::shared_ptr<LaneDial>& lane, Step next) {
  lane->connection.socket.async_wait(lane->connection.next_event(),
                                     [self = shared_from_this(), lane, next](std::error_code ec) {
                                       if (!ec) {
                                         (*self.*next)(lane);
                                       }
                                     });
}

KVFERRY_INLINE void DataDialer::read_welcome(const std::shared_ptr<LaneDial>& lane) {
  std::error_code ec;
  std::string why;
  {
    const std::lock_guard lock(mutex_);
    while (on_link_ && !ec && lane->received < lane->bytes.size()) {
      lane->received += lane->connection.read_some(std::span(lane->bytes).subspan(lane->received), ec);
    }
    if (!on_link_) {
      return;
    }
    if (ec == asio::error::would_block || ec == asio::error::try_again) {
      when_readable(lane, &DataDialer::read_welcome);
      return;
    }
    if (!ec) {
      Hello welcome;
      std::memcpy(&welcome, lane->bytes.data(), sizeof(welcome));
      Secret expected;
      std::ranges::copy(endpoint_.accept_secret, expected.begin());
      if (welcome.magic == Hello::come_again) {
        come_again(lane);
        return;
      }
      if (welcome.magic != Hello::accepting || welcome.version != Hello().version || welcome.lane != lane->number ||
          welcome.lane_count != lanes_.size() || !equal_secrets(welcome.secret, expected) ||
          welcome.incarnation != host_->peer().incarnation) {
        ec = errc::authentication_failed;
        why = " did not prove that it belongs to the peer";
      } else if (++welcomed_ < lanes_.size()) {
        return;
      }
    } else if (may_be_a_crowd(*lane, ec)) {
      come_again(lane);
      return;
    } else if (const auto& tls = lane->connection.tls; tls && !tls->why().empty()) {
      // The accepting side looks at a certificate when this one has said all of TLS's handshake.
      ec = errc::authentication_failed;
      why = ": " + tls->why();
    } else {
      // Gone, out of patience or of descriptors: the accepting side says nothing when it closes a connection.
      why = " was closed before it was welcomed: " + ec.message();
      ec = ec == asio::error::eof ? std::error_code(errc::peer_closed) : ec;
    }
  }
  if (ec) {
    fail(ec, where() + why);
  } else {
    finish();
  }
}

/// The accepting side had to let go of one of many.
KVFERRY_INLINE void DataDialer::come_again(const std::shared_ptr<LaneDial>& lane) {
  const auto to = lane->to;
  lane->connection.close();
  lane->connection.tls.reset();
  lane->begun = false;
  lane->received = 0;
  lane->again.expires_after(again_pause);
  lane->again.async_wait([self = shared_from_this(), lane, to](std::error_code aborted) {
    const std::lock_guard lock(self->mutex_);
    if (!aborted && self->on_link_) {
      self->connect(lane, to);
    }
  });
}

KVFERRY_INLINE void DataDialer::finish() {
  kit::LinkHandler on_link;
  std::vector<std::shared_ptr<LaneDial>> lanes;
  {
    const std::lock_guard lock(mutex_);
    on_link = std::exchange(on_link_, {});
    timer_.cancel();
    lanes.swap(lanes_);
  }
  if (!on_link) {
    return;
  }
  std::shared_ptr<TcpLink> link;
  try {
    std::vector<Lane::Connection> connections;
    connections.reserve(lanes.size());
    for (const auto& lane : lanes) {
      connections.push_back(connection_of(std::move(lane->connection.socket), std::move(lane->connection.tls)));
    }
    link = TcpLink::create(host_, std::move(connections), options_.link);
  } catch (...) {
    auto failure = kit::failure_being_handled();
    on_link(failure.code, nullptr, where() + ": " + failure.sentence);
    return;
  }
  // Handed over first: a channel that is being closed must find the link, and shut it, before it touches a region.
  on_link({}, link, {});
  link->run();
}

KVFERRY_INLINE void DataDialer::fail(std::error_code cause, std::string why) {
  kit::LinkHandler on_link;
  {
    const std::lock_guard lock(mutex_);
    on_link = std::exchange(on_link_, {});
    timer_.cancel();
    if (race_) {
      race_->stop();
    }
    for (const auto& lane : lanes_) {
      lane->connection.close();
      lane->again.cancel();
    }
    lanes_.clear();
  }
  if (on_link) {
    on_link(system_code(cause), nullptr, std::move(why));
  }
}

}  // namespace kvferry::tcp
