// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_HANDSHAKE_SERVICE_HPP
#define KVFERRY_KIT_HANDSHAKE_SERVICE_HPP

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <system_error>

#include <kvferry/config.hpp>
#include <kvferry/keyring.hpp>
#include <kvferry/kit/refusals.hpp>
#include <kvferry/side_message.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Asks and answers side messages over ZeroMQ: a ROUTER that serves kvferry clients and plain REQ sockets alike, and
/// a client socket for each question. It is independent of the transport, and doesn't interpret the messages.
///
/// One thread runs all of it, whatever the number of peers, so neither a slow peer nor one that never answers delays
/// another. Every request gets exactly one reply, errors included; frames that aren't messages are answered with a
/// `SideMessageError` and harm nobody. No socket is used for a second question.
///
/// Thread safety: all member functions may be called from any thread.
class KVFERRY_EXPORT HandshakeService {
 public:
  struct Options {
    /// Where to listen: `tcp://host:port`, `host:port`, IPv6 in brackets, port 0 for any, host `*` for all.
    /// Empty: only asks.
    std::string bind_url;
    /// A ZeroMQ context (`void*` as of `zmq_ctx_new`) that stays the caller's and is never terminated here. Null: one
    /// that all channels of the process share, gone with the last of them.
    void* zmq_context = nullptr;
    /// A received message above this is an error; above twice this ZeroMQ drops the connection. A sent one: a question
    /// that is larger fails with EMSGSIZE; in place of an answer that is larger, a `SideMessageError` is sent.
    std::size_t max_message_bytes = std::size_t{64} << 10;
    /// Counts and logs the connections that are refused at the port. May be null.
    std::shared_ptr<Refusals> refusals = nullptr;
    /// How long the lookup of a host's name in `bind_url` may take.
    std::chrono::milliseconds lookup_timeout{10'000};
    /// Its own key, and the keys of the peers that it asks and answers. Null: no keys, so it answers anybody. With a
    /// keyring, `zmq_context` is null, and the service has a context of its own.
    std::shared_ptr<const Keyring> keyring = nullptr;
  };

  /// The one reply to a request. Move-only; may be kept and called later from any thread. If it is destroyed uncalled,
  /// the peer gets a `SideMessageError` with `errc::handshake_failed`. After the service is closed a call does nothing.
  class Reply {
   public:
    Reply(Reply&&) noexcept;
    Reply& operator=(Reply&&) noexcept;
    ~Reply();
    void operator()(const SideMessage& answer);

    /// The origin of the request: an IPv4 address, or an IPv6 network, "2001:db8::/64", whose addresses belong
    /// together. Empty once the reply has been given, or if the connection had ended before the request was read.
    [[nodiscard]] std::string source() const;
    /// The public key of the request's sender; empty without a keyring, or once the reply has been given.
    [[nodiscard]] std::string key() const;

    struct State;
    explicit Reply(std::unique_ptr<State> state) noexcept;

   private:
    std::unique_ptr<State> state_;
  };

  /// Gets every well-formed request. Runs on the service's thread: must not block. An exception is answered as an
  /// error.
  using RequestHandler = std::function<void(SideMessage request, Reply reply)>;

  /// Gets the outcome of one question: a message, or an error and a sentence that names the url; and the numeric
  /// address of the connection (empty if there was none). A name may have several addresses, so it is known only then.
  /// Runs on a thread of the service: must not block.
  using AnswerHandler =
      std::function<void(std::error_code, SideMessage answer, std::string diagnostic, std::string reached_address)>;

  /// @throws TransferError `errc::invalid_url`, or the errno of the bind (EADDRINUSE, ...), naming the url.
  HandshakeService(Options options, RequestHandler on_request);
  HandshakeService(const HandshakeService&) = delete;
  HandshakeService& operator=(const HandshakeService&) = delete;
  ~HandshakeService();

  /// `tcp://host:port` with the port that was bound; empty if it doesn't listen.
  [[nodiscard]] std::string bound_url() const;

  /// Sends `question` to `url` and hands the answer to `on_answer`, exactly once: by the deadline with
  /// `errc::timed_out` if none came, at `close` with `errc::closed`. A `SideMessageError` that comes back is handed out
  /// as its error code (`errc::handshake_failed` if the code is unknown) and its sentence. `on_answer` is called after
  /// `ask` has returned. (In a forked child of the process that made the service it is called inside, with
  /// `errc::forked`.)
  /// @param peer_id the peer whose key in the keyring the answering side must have. If there is no such key, or the
  ///   answering side has another one, the question ends with `errc::authentication_failed`. Empty: any key of the
  ///   keyring.
  void ask(const std::string& url, SideMessage question, std::chrono::steady_clock::time_point deadline,
           AnswerHandler on_answer, const std::string& peer_id = {});

  /// Ends all questions with `errc::closed`, closes all sockets (LINGER 0) and joins the thread, unless called on it.
  /// Idempotent.
  void close();

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_HANDSHAKE_SERVICE_HPP
