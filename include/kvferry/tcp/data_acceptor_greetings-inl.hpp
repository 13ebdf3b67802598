// SPDX-License-Identifier: Apache-2.0
#pragma once

// Data connections that have proved nothing yet: their hello, who of them makes room for others, and who is turned away.
#include <asio/buffer.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <exception>
#include <iterator>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include <kvferry/detail/source_address.hpp>
#include <kvferry/detail/text.hpp>
#include <kvferry/tcp/data_acceptor-inl.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

/// Connections that a source may have beyond those that its handshakes have announced.
inline constexpr std::size_t unannounced_greetings = 64;
/// Connections of one handshake that agree on keys without waiting, in all: twice those that it has announced, as some may be
/// told to come again, and so many. One that has ended counts on, or whoever makes and ends them would keep threads at work.
inline constexpr std::size_t spare_openings = 8;
/// A peer of this project's has the end of TLS's handshake and its hello under way when its certificate is refused: a few KiB.
inline constexpr std::size_t max_past_refusal = std::size_t{64} << 10;

}  // namespace internal

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
  greeting->place = std::prev(greetings_.end());
  try {
    ++greetings_of_[greeting->source];
    bound_time(greeting);
    wait_for_hello(greeting);
  } catch (...) {
    drop(greeting);  // memory is used up
    throw;
  }
}

KVFERRY_INLINE void DataAcceptor::bound_time(const std::shared_ptr<Greeting>& greeting) {
  greeting->timer.expires_after(options_.hello_timeout);
  greeting->timer.async_wait([self = shared_from_this(), weak = std::weak_ptr(greeting)](std::error_code aborted) {
    const std::lock_guard lock(self->mutex_);
    const auto late = weak.lock();
    // Another thread may have taken it away meanwhile or given it more time, too late to cancel this.
    if (aborted || !late || late->gone || late->timer.expiry() > asio::steady_timer::clock_type::now()) {
      return;
    }
    if (!late->refused) {
      kit::if_memory_lasts([&] {
        if (late->postponed) {
          self->refusals_->count(
              errc::resource_limit, late->source,
              "a data connection got no turn in time: more of them name its handshake than it announced");
        } else {
          self->refusals_->count(errc::timed_out, late->source, "a data connection didn't say its hello in time");
        }
      });
    }
    late->comes_again = late->postponed;  // it has said all that it could
    self->drop(late);
  });
}

/// Lets go of the oldest, of a source that has its share or of the one that has most, if there are too many: of those that wait
/// for a turn if they are most of that source's, or else of the others. So neither many silent ones nor many that name one
/// handshake drive out the other kind.
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
  const auto of_greedy = [greedy](const auto& greeting) { return greeting->source == *greedy; };
  const auto postponed = static_cast<std::size_t>(std::ranges::count_if(
      greetings_, [&](const auto& greeting) { return greeting->postponed && of_greedy(greeting); }));
  const bool mostly_postponed = postponed > greetings_of_.find(*greedy)->second / 2;
  const auto oldest = std::ranges::find_if(
      greetings_, [&](const auto& greeting) { return greeting->postponed == mostly_postponed && of_greedy(greeting); });
  refusals_->count(errc::resource_limit, *greedy, "a data connection without a hello had to make room for a newer one");
  // An honest peer comes again.
  (*oldest)->comes_again = true;
  drop(*oldest);
}

KVFERRY_INLINE void DataAcceptor::tell_to_come_again(DataConnection& connection) const {
  Hello again;
  again.magic = Hello::come_again;
  again.incarnation = options_.incarnation;
  std::error_code ignored;
  // If a socket is closed with bytes unread, the kernel drops the bytes that were written.
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
  greetings_.erase(greeting->place);
  const auto of_source = greetings_of_.find(greeting->source);
  // There was no memory to count it by, perhaps.
  if (of_source != greetings_of_.end() && --of_source->second == 0) {
    greetings_of_.erase(of_source);
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
    if (greeting->postponed) {
      postpone(greeting);
      return;
    }
    try {
      wait_for_hello(greeting);
    } catch (const std::exception&) {
      drop(greeting);  // memory is used up
    }
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

/// Whoever knows a handshake's name, from its own or from the network, could keep a thread at work with it.
KVFERRY_INLINE std::optional<TlsKey> DataAcceptor::key_for(Greeting& greeting, std::span<const std::byte> identity) {
  const std::lock_guard lock(mutex_);
  const auto found = std::ranges::find_if(expected_, [identity](const auto& candidate) {
    return candidate->tls_key && std::ranges::equal(candidate->tls_key->identity, identity);
  });
  if (found == expected_.end()) {
    return std::nullopt;
  }
  Expected& expected = **found;
  if (!greeting.has_turn && expected.openings >= 2 * expected.connections.size() + spare_openings) {
    greeting.postponed = true;
    greeting.waits_for = *found;
    return std::nullopt;
  }
  ++expected.openings;
  return expected.tls_key;
}

KVFERRY_INLINE void DataAcceptor::postpone(const std::shared_ptr<Greeting>& greeting) {
  try {
    std::list<std::weak_ptr<Greeting>> entry{greeting};
    if (postponed_.empty()) {
      wait_for_turns();
    }
    postponed_.splice(postponed_.end(), entry);  // not without a turn to come
  } catch (const std::exception&) {
    drop(greeting);  // memory is used up
  }
}

KVFERRY_INLINE void DataAcceptor::wait_for_turns() {
  next_turn_.expires_after(options_.turn_pause);
  next_turn_.async_wait([self = shared_from_this()](std::error_code aborted) {
    if (!aborted) {
      self->give_a_turn();
    }
  });
}

KVFERRY_INLINE void DataAcceptor::give_a_turn() {
  std::shared_ptr<Greeting> next;
  {
    const std::lock_guard lock(mutex_);
    while (!closed_ && !next && !postponed_.empty()) {
      next = postponed_.front().lock();
      postponed_.pop_front();
      if (next && !next->gone && next->waits_for.expired()) {
        kit::if_memory_lasts([&] { refuse(next); });
        drop(next);
      }
      if (next && next->gone) {
        next = nullptr;
      }
    }
    if (!next) {
      return;
    }
    next->postponed = false;
    next->has_turn = true;
    std::erase_if(postponed_, [](const auto& waiting) { return waiting.expired(); });
    if (!postponed_.empty()) {
      try {
        wait_for_turns();
      } catch (const std::exception&) {
        postponed_.clear();  // memory is used up: when their time is over, they are told to come again
      }
    }
    try {
      bound_time(next);  // that it has waited is none of its own time
    } catch (const std::exception&) {
      drop(next);  // memory is used up
      return;
    }
  }
  read_hello(next);
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
    const auto ec = connection.tls->shake_hands();
    if (greeting.postponed) {
      connection.tls.reset();  // it has said nothing, and begins anew with the opening
      return asio::error::would_block;
    }
    std::vector<std::byte>().swap(greeting.opening);
    if (ec) {
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

/// No memory is set aside for a connection before it has sent the beginning of TLS. A peer that then shows no key of a
/// handshake is turned away before keys are agreed.
KVFERRY_INLINE std::error_code DataAcceptor::receive_opening(Greeting& greeting) {
  for (;;) {
    std::size_t length = 0;
    switch (look_at_tls_opening(greeting.opening, length)) {
      case TlsOpening::none: return errc::authentication_failed;
      case TlsOpening::incomplete: break;
      case TlsOpening::whole:
        greeting.connection.tls =
            options_.tls->accept(greeting.connection.socket.native_handle(), greeting.opening,
                                 [this, &greeting, asked = false](std::span<const std::byte> identity) mutable {
                                   // A peer names one handshake. Whoever names many doesn't have them all looked for.
                                   return std::exchange(asked, true) ? std::nullopt : key_for(greeting, identity);
                                 });
        return {};
    }
    const std::size_t had = greeting.opening.size();
    greeting.opening.resize(length);
    std::error_code ec;
    const std::size_t received = greeting.connection.read_some(std::span(greeting.opening).subspan(had), ec);
    greeting.opening.resize(had + received);
    if (ec) {
      return ec;
    }
  }
}

KVFERRY_INLINE void DataAcceptor::drop(const std::shared_ptr<Greeting>& greeting) {
  // NOLINTNEXTLINE(performance-unnecessary-copy-initialization): keeps it alive where the argument is the list's own element
  const auto dropped = greeting;
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

}  // namespace kvferry::tcp
