// SPDX-License-Identifier: Apache-2.0
#pragma once

// Data connections that have proved nothing yet: their hello, who of them makes room for others, and who is turned away.
#include <asio/buffer.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
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
/// Connections of one handshake that agree on keys at once: twice those that it has announced, as some may be told to come
/// again, and so many. Of further ones, one does each time that this pause is over.
inline constexpr std::size_t spare_openings = 8;
inline constexpr std::chrono::milliseconds turn_pause{4};
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
  try {
    ++greetings_of_[greeting->source];
    greeting->timer.expires_after(options_.hello_timeout);
    greeting->timer.async_wait([self = shared_from_this(), weak = std::weak_ptr(greeting)](std::error_code aborted) {
      const std::lock_guard lock(self->mutex_);
      // Another thread may have taken it away meanwhile, too late to cancel this.
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
  const auto of_greedy = [greedy](const auto& greeting) { return greeting->source == *greedy; };
  auto oldest = std::ranges::find_if(greetings_,
                                     [&](const auto& greeting) { return greeting->postponed && of_greedy(greeting); });
  if (oldest == greetings_.end()) {
    oldest = std::ranges::find_if(greetings_, of_greedy);
  }
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
  greetings_.remove(greeting);
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
    } else {
      wait_for_hello(greeting);
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
KVFERRY_INLINE bool DataAcceptor::names_a_worn_handshake(std::span<const std::byte> opening) const {
  return std::ranges::any_of(expected_, [opening](const std::shared_ptr<Expected>& expected) {
    if (!expected->tls_key || expected->openings < 2 * expected->connections.size() + spare_openings) {
      return false;
    }
    const auto& name = expected->tls_key->identity;
    return std::search(opening.begin(), opening.end(), name.begin(), name.end()) != opening.end();
  });
}

KVFERRY_INLINE void DataAcceptor::postpone(const std::shared_ptr<Greeting>& greeting) {
  try {
    postponed_.push_back(greeting);
    if (postponed_.size() == 1) {
      wait_for_turns();
    }
  } catch (const std::exception&) {
    drop(greeting);  // memory is used up
  }
}

KVFERRY_INLINE void DataAcceptor::wait_for_turns() {
  next_turn_.expires_after(turn_pause);
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
    while (!next && !postponed_.empty()) {
      next = postponed_.front().lock();
      postponed_.pop_front();
      if (next && next->gone) {
        next = nullptr;
      }
    }
    if (closed_ || !next) {
      return;
    }
    next->postponed = false;
    next->has_turn = true;
    std::erase_if(postponed_, [](const auto& waiting) { return waiting.expired(); });
    if (!postponed_.empty()) {
      try {
        wait_for_turns();
      } catch (const std::exception&) {
        postponed_.clear();  // memory is used up: they end with their time
      }
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

/// No memory is set aside for a connection before it has sent the beginning of TLS. A peer that then shows no key of a
/// handshake is turned away before keys are agreed.
KVFERRY_INLINE std::error_code DataAcceptor::receive_opening(Greeting& greeting) {
  for (;;) {
    std::size_t length = 0;
    switch (look_at_tls_opening(greeting.opening, length)) {
      case TlsOpening::none: return errc::authentication_failed;
      case TlsOpening::incomplete: break;
      case TlsOpening::whole:
        if (!greeting.has_turn) {
          const std::lock_guard lock(mutex_);
          if (names_a_worn_handshake(greeting.opening)) {
            greeting.postponed = true;
            return asio::error::would_block;
          }
        }
        greeting.connection.tls = options_.tls->accept(
            greeting.connection.socket.native_handle(), greeting.opening,
            [this](std::span<const std::byte> identity) -> std::optional<TlsKey> {
              const std::lock_guard lock(mutex_);
              const auto expected = std::ranges::find_if(expected_, [identity](const auto& candidate) {
                return candidate->tls_key && std::ranges::equal(candidate->tls_key->identity, identity);
              });
              if (expected == expected_.end()) {
                return std::nullopt;
              }
              ++(*expected)->openings;
              return (*expected)->tls_key;
            });
        std::vector<std::byte>().swap(greeting.opening);
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
