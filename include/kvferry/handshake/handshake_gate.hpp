// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <zmq.hpp>

#include <kvferry/kit/refusals.hpp>
#include <kvferry/url.hpp>

#include <kvferry/detail/descriptor.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Stands at the handshake's port in front of a ROUTER, and hands the bytes of each connection on to it.
///
/// ZeroMQ alone would take any number of connections from anybody, keep each for as long as it likes to stay, and store
/// the parts of a message until the last one has come, however many there are. The gate reads nothing of what passes,
/// so that it serves every mechanism of ZeroMQ's, but counts: connections, in total and by source; bytes that ZeroMQ
/// has got of a connection and that have made no request yet; and the time since a connection did what it should. It
/// gives each connection a name of its own at the ROUTER, whatever the peer calls itself.
///
/// Not thread-safe: belongs to the thread that the ROUTER belongs to.
class HandshakeGate {
 public:
  using Clock = std::chrono::steady_clock;

  struct Bounds {
    /// Bytes that a connection may send beyond its last complete request.
    std::size_t connection_bytes = 0;
    /// The same, added up over the connections of one source, and over all. The first `free_bytes` of each connection pass
    /// in any case. So does all that the oldest one of those with more may send, lest they wait for each other: of a source
    /// within the total, and of all.
    std::size_t source_bytes = 0;
    std::size_t total_bytes = 0;
    std::size_t free_bytes = 2048;
    std::size_t connections = 0;
    /// Answers that ZeroMQ has got for a connection, for those of a source, and for all, and that have not left it. Where a
    /// sum is used up, who has most of it has to go.
    std::size_t unread_bytes = 0;
    std::size_t source_unread_bytes = 0;
    std::size_t total_unread_bytes = 0;
    /// Between a connection's beginning, or the first `free_bytes` of a request, and the request's end; and for what of an
    /// answer has reached the gate to be taken.
    std::chrono::milliseconds patience{3'000};
    /// For a connection that has nothing to say.
    std::chrono::milliseconds idle{30'000};

    /// Lets no more than the first bytes of a peer's greeting in before all of ZeroMQ's own has left. Of a peer with another
    /// mechanism ZeroMQ hangs up, and what it hasn't sent by then the peer never hears: not even which mechanism is asked for.
    /// Peers older than ZMTP 3.0 would wait for ever, and have no mechanisms.
    bool greets_first = false;

    /// @param message the largest frame that ZeroMQ takes.
    [[nodiscard]] static Bounds of(std::size_t message);
  };

  /// Listens at the address. The ROUTER must not be bound, and outlive the gate.
  /// @param refusals told of whoever is turned away, if it isn't null.
  /// @throws std::system_error with the errno of what failed.
  HandshakeGate(zmq::socket_ref router, const HostPort& address, const Bounds& bounds,
                std::shared_ptr<Refusals> refusals = nullptr);
  HandshakeGate(const HandshakeGate&) = delete;
  HandshakeGate& operator=(const HandshakeGate&) = delete;
  ~HandshakeGate();

  [[nodiscard]] std::uint16_t port() const noexcept { return port_; }
  /// Readable when there is something for `serve` to do.
  [[nodiscard]] int event_fd() const noexcept { return events_.get(); }

  /// Does some of what there is to do. Throws `zmq::error_t` if ZeroMQ's context is terminated.
  void serve();

  /// When `expire` has something to do.
  [[nodiscard]] std::optional<Clock::time_point> next_deadline() const noexcept { return next_sweep_; }
  void expire(Clock::time_point now);

  /// Has ZeroMQ forget the connections that have ended. To be called when all frames of a message have been received, or
  /// none, and it hasn't been asked since whether there is another: it doesn't survive the loss of a half-read message.
  void retire();

  /// A request came out of the ROUTER. @param name the connection's, @param bytes of all frames behind the name.
  /// @return the source: an IPv4 address or the first half of an IPv6 address; empty if the connection is gone.
  std::string request_taken(std::string_view name, std::size_t frames, std::size_t bytes);
  /// A request is about to be answered. @return whether it is worth while: a connection that doesn't take its answers is
  /// closed, lest ZeroMQ store them.
  [[nodiscard]] bool request_answered(std::string_view name, std::size_t bytes);

 private:
  struct Source {
    std::size_t connections = 0;
    std::size_t bytes = 0;
    std::size_t unread = 0;
    std::set<std::uint64_t> unfinished;  ///< Connections with more than `free_bytes`, oldest first.
  };
  using SourceEntry = std::map<std::string, Source>::iterator;

  /// How far a connection has come, and so how much it deserves to be kept.
  enum class Phase : std::uint8_t { silent, joining, open };

  struct Connection {
    std::uint64_t number = 0;
    Descriptor outer;       ///< To the peer.
    Descriptor rendezvous;  ///< Where ZeroMQ connects to.
    Descriptor inner;       ///< To ZeroMQ.
    std::string endpoint;   ///< ZeroMQ's name of the rendezvous.
    std::uint32_t outer_events = 0;
    std::uint32_t inner_events = 0;
    SourceEntry source;
    Phase phase = Phase::silent;
    bool ending = false;       ///< ZeroMQ has hung up: what is on its way to the peer is the last.
    Clock::time_point since;   ///< Since when it has been as it is.
    std::size_t bytes = 0;     ///< That made no request yet.
    std::size_t requests = 0;  ///< Taken and not answered.
    std::size_t unread = 0;    ///< Bytes of answers that ZeroMQ still has.
    bool has_asked = false;
    bool ungreeted = false;    ///< See `ungreeted_`.
    std::size_t greeted = 0;   ///< Bytes of ZeroMQ's greeting that have left.
    bool peer_greets = false;  ///< What shows the peer's version has come in.
    std::vector<char> to_inner;
    std::vector<char> to_outer;
  };
  using Table = std::map<std::uint64_t, Connection>;

  /// The owner of an event's descriptor.
  enum class Role : std::uint64_t { outer, inner, rendezvous };
  static constexpr std::uint64_t tag_of(std::uint64_t number, Role role) {
    return number * 4 + static_cast<std::uint64_t>(role);
  }
  static constexpr std::uint64_t listener_tag = 0;  // connections are numbered from 1

  // Accepting (handshake_gate_accept-inl.hpp)
  void accept_some();
  bool accept_one();
  [[nodiscard]] static bool has_hung_up(const Descriptor& outer);
  void admit(Descriptor descriptor, std::string source);
  [[nodiscard]] bool make_room(const std::string& source);
  [[nodiscard]] static bool awaits_answer(const Connection& connection);
  [[nodiscard]] bool may_give_way(const Connection& connection, Clock::time_point now) const;
  void pause_accepting(bool pause);

  void read_signature(Connection& connection);
  /// Where ZeroMQ is to connect to: a socket that has a name and no file.
  [[nodiscard]] Descriptor open_rendezvous(std::uint64_t number) const;
  [[nodiscard]] std::string rendezvous_name(std::uint64_t number) const;
  void join(Connection& connection);
  void joined(Connection& connection);
  /// ZeroMQ has greeted it, or it is being closed.
  void was_greeted(Connection& connection);
  void say_no_room(const Descriptor& outer) const;

  // Requests, and who has to go (handshake_gate-inl.hpp)
  void close(Table::iterator at);
  [[nodiscard]] bool owes(const Connection& connection) const;
  [[nodiscard]] Clock::time_point deadline(const Connection& connection) const;
  void sweep_by(Clock::time_point when);
  [[nodiscard]] Table::iterator find(std::string_view name);
  [[nodiscard]] Table::iterator most_unread(const Source* source);
  void refused(std::error_code cause, const std::string& source, std::string_view why) const;

  // Passing bytes on (handshake_gate_bytes-inl.hpp)
  [[nodiscard]] bool pump(Connection& connection);
  [[nodiscard]] bool pump_inward(Connection& connection);
  [[nodiscard]] bool pump_outward(Connection& connection);
  [[nodiscard]] std::size_t allowance(const Connection& connection) const;
  void watch(Connection& connection);
  void watch_outer(Connection& connection, std::uint32_t wants);
  void watch_inner(Connection& connection, std::uint32_t wants);
  void feed_starved();
  void add(Connection& connection, std::size_t bytes);
  void release(Connection& connection, std::size_t bytes);
  void has_left(Connection& connection, std::size_t bytes);

  zmq::socket_ref router_;
  const Bounds bounds_;
  const std::shared_ptr<Refusals> refusals_;
  const pid_t process_;
  const std::string name_;  ///< What the names of its rendezvous begin with.
  Descriptor events_;
  Descriptor listener_;
  Descriptor spare_;  ///< Given up for a moment to turn a connection away when the process has no other.
  std::uint16_t port_ = 0;
  bool accepting_ = true;
  std::size_t ungreeted_ = 0;  ///< Connections that ZeroMQ has got and from which nothing has come out of it yet.
  std::uint64_t last_number_ = 0;
  std::map<std::string, Source> sources_;
  Table connections_;
  std::set<std::uint64_t> starved_;  ///< Those not read from because others have used up what they share.
  std::set<std::uint64_t> unfinished_;  ///< See `Source`.
  std::size_t bytes_ = 0;
  std::size_t unread_ = 0;
  std::optional<Clock::time_point> next_sweep_;
  std::vector<std::string> retired_;
  std::vector<char> buffer_;
};

}  // namespace kvferry::kit
