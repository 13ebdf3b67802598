// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/any_io_executor.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/steady_timer.hpp>

#include <chrono>
#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <kvferry/kit/link.hpp>
#include <kvferry/kit/refusals.hpp>

#include <kvferry/tcp/certificates.hpp>
#include <kvferry/tcp/hello.hpp>
#include <kvferry/tcp/tcp_link.hpp>
#include <kvferry/tcp/tls_stream.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

struct DataConnection;

struct LinkOptions {
  std::uint64_t incarnation = 0;
  std::chrono::milliseconds hello_timeout{0};
  TcpLink::Options link;
  SocketOptions socket;
  /// Of connections that name a handshake after many others did, one agrees on keys each time that this is over.
  std::chrono::milliseconds turn_pause{4};
  std::shared_ptr<TlsContext> tls = nullptr;             ///< Null: data connections are not encrypted.
  std::shared_ptr<Certificates> certificates = nullptr;  ///< Null: none are shown, and the handshake's key encrypts.
};

/// Accepts data connections. Each has to prove in time that it belongs to a handshake; connections that belong together
/// become a link. The number of connections without a proof is limited, by source and in all; the oldest gives way and
/// is told to connect again. Connections that handshakes have announced don't count against their source. Agreeing on
/// keys costs time, so more connections of one handshake than a peer makes wait while others are dealt with.
class DataAcceptor : public std::enable_shared_from_this<DataAcceptor> {
 public:
  DataAcceptor(const asio::any_io_executor& executor, LinkOptions options, std::shared_ptr<kit::Refusals> refusals);

  /// @param host an address or name; `*` for all addresses. @param port 0 for any. @param lookup_timeout of a name.
  /// @param left_free somebody else is going to listen at this port, so "any" is another one, if there is one. 0: nobody is.
  /// @throws TransferError with the errno of the failure, naming the address; `errc::timed_out` for a name.
  void listen(const std::string& host, std::uint16_t port, std::chrono::milliseconds lookup_timeout,
              std::uint16_t left_free = 0);
  [[nodiscard]] std::uint16_t port() const;

  /// Called for each handshake: hellos with the returned secret form its link.
  /// @param certificate the hash that the dialing side has told, if this side has certificates.
  [[nodiscard]] AcceptEndpoint expect(std::shared_ptr<kit::LinkHost> host, std::size_t lanes,
                                      kit::Clock::time_point deadline, kit::LinkHandler on_link,
                                      const CertificateHash& certificate = {});

  /// Stops listening and drops connections that are not part of a link yet.
  void close();

 private:
  struct Expected;
  struct Greeting;

  // Handshakes, and links (data_acceptor-inl.hpp)
  void accept_next();
  void accept_later();
  void admit(const std::shared_ptr<Greeting>& greeting, std::unique_lock<std::mutex>& lock);
  void complete(const std::shared_ptr<Expected>& expected, std::unique_lock<std::mutex>& lock);
  void bound_parts(std::unique_lock<std::mutex>& lock);
  void abandon(const std::shared_ptr<Expected>& expected);
  void give_up(const std::shared_ptr<Expected>& expected);

  // Connections that have proved nothing yet (data_acceptor_greetings-inl.hpp)
  void greet(asio::ip::tcp::socket socket);
  void read_hello(const std::shared_ptr<Greeting>& greeting);
  /// @return an error that is no `would_block`: it is none of a peer's.
  [[nodiscard]] std::error_code receive_hello(Greeting& greeting);
  [[nodiscard]] std::error_code receive_opening(Greeting& greeting);
  [[nodiscard]] std::error_code read_past_refusal(Greeting& greeting);
  void refuse(const std::shared_ptr<Greeting>& greeting);
  [[nodiscard]] std::string why_refused(const Greeting& greeting) const;
  void wait_for_hello(const std::shared_ptr<Greeting>& greeting);
  void bound_time(const std::shared_ptr<Greeting>& greeting);
  /// None also if it has to wait for its turn.
  [[nodiscard]] std::optional<TlsKey> key_for(Greeting& greeting, std::span<const std::byte> identity);
  void postpone(const std::shared_ptr<Greeting>& greeting);
  void wait_for_turns();
  void give_a_turn();
  void make_room(const std::string& source);
  void tell_to_come_again(DataConnection& connection) const;
  void drop(const std::shared_ptr<Greeting>& greeting);
  void close(Greeting& greeting) const;
  void forget(const std::shared_ptr<Greeting>& greeting);

  const asio::any_io_executor executor_;
  const LinkOptions options_;
  const std::shared_ptr<kit::Refusals> refusals_;
  const std::size_t max_greetings_;
  mutable std::mutex mutex_;  ///< Guards all below, the state of the sockets included but for greetings that are busy.
  asio::ip::tcp::acceptor acceptor_;
  asio::steady_timer accept_pause_;
  std::list<std::shared_ptr<Greeting>> greetings_;
  std::map<std::string, std::size_t> greetings_of_;  ///< By source.
  std::list<std::shared_ptr<Expected>> expected_;
  std::list<std::weak_ptr<Greeting>> postponed_;  ///< The oldest first; some may be gone.
  asio::steady_timer next_turn_;
  /// Whether connections are waited for, or will be after a pause. False where memory was used up: `expect` waits anew.
  bool accepts_ = false;
  bool closed_ = false;
};

}  // namespace kvferry::tcp
