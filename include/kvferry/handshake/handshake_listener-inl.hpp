// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/handshake/handshake_listener.hpp>

#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

#include <kvferry/detail/name_resolution.hpp>
#include <kvferry/detail/side_message_error.hpp>
#include <kvferry/handshake/curve.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// Requests that are taken before the questions have their turn.
inline constexpr int requests_a_turn = 64;
/// ZeroMQ's limit.
inline constexpr std::size_t longest_routing_id = 255;

KVFERRY_INLINE Bytes copy_of(const zmq::message_t& frame) {
  const auto bytes = bytes_of(frame);
  return {bytes.begin(), bytes.end()};
}

/// The frames in front of the request: the identities that lead back to the peer and, last, the empty frame of its REQ.
/// Only the first identity if there is no empty frame.
KVFERRY_INLINE std::vector<Bytes> envelope_of(const std::vector<zmq::message_t>& frames) {
  const auto ends_identities = [](const auto& frame) { return frame.size() == 0 || frame.size() > longest_routing_id; };
  const auto delimiter = std::find_if(frames.begin() + 1, frames.end(), ends_identities);
  const bool complete = delimiter != frames.end() && delimiter->empty();
  std::vector<Bytes> envelope;
  std::transform(frames.begin(), complete ? delimiter + 1 : frames.begin() + 1, std::back_inserter(envelope), copy_of);
  return envelope;
}

KVFERRY_INLINE SideMessage error_message(std::error_code ec, const std::string& text) {
  const bool is_own = ec.category() == error_category();
  return refusal(is_own ? static_cast<errc>(ec.value()) : errc::handshake_failed, text);
}

KVFERRY_INLINE HandshakeGate::Bounds bounds_for(const HandshakeService::Options& options) {
  auto bounds = HandshakeGate::Bounds::of(largest_frame(options.max_message_bytes));
  bounds.greets_first = options.keyring != nullptr;
  return bounds;
}

}  // namespace internal

KVFERRY_INLINE HandshakeListener::HandshakeListener(const SharedContext& context,
                                                    const HandshakeService::Options& options,
                                                    HandshakeService::RequestHandler on_request,
                                                    std::weak_ptr<HandshakeMailbox> mailbox)
    : max_message_bytes_(options.max_message_bytes),
      keyring_(options.keyring),
      socket_(context, zmq::socket_type::router, largest_frame(options.max_message_bytes)),
      gate_(socket_.ref(), listening_address(parse_url(options.bind_url), options.lookup_timeout), bounds_for(options),
            options.refusals),
      refusals_(options.refusals),
      on_request_(std::move(on_request)),
      mailbox_(std::move(mailbox)) {
  auto url = parse_url(options.bind_url);
  url.port = gate_.port();
  bound_url_ = url.to_url();
  use_own_key();
}

/// ZeroMQ gives a connection the key that the socket has when the gate has it connect.
KVFERRY_INLINE void HandshakeListener::use_own_key() {
  if (keyring_) {
    key_revision_ = keyring_->revision();
    secure_server(socket_.ref(), *keyring_);
  }
}

KVFERRY_INLINE void HandshakeListener::serve() {
  const auto mailbox = mailbox_.lock();
  for (int served = 0; served < requests_a_turn && !mailbox->closed() && serve_one(); ++served) {
  }
  if (keyring_ && keyring_->revision() != key_revision_) {
    use_own_key();
  }
  gate_.serve();
}

KVFERRY_INLINE bool HandshakeListener::serve_one() {
  std::size_t bytes = 0;
  auto frames = socket_.receive(&bytes);
  if (frames.empty()) {
    return false;
  }
  auto envelope = envelope_of(frames);
  auto source = gate_.request_taken(frames.front().to_string_view(), frames.size(), bytes);
  const auto payload_begins = envelope.size();
  const bool has_delimiter = payload_begins > 1;
  const auto request = std::make_shared<ServedRequest>(std::move(envelope), std::move(source),
                                                       keyring_ ? KeyCheck::key_of(frames.back()) : std::string());
  // Known when the connection was made, it may have been taken off the keyring since.
  if (keyring_ && !keyring_->knows(request->key)) {
    refuse_stranger(request, errc::authentication_failed, "the keyring has no peer with the key " + request->key);
    return true;
  }
  if (!has_delimiter) {
    refuse_stranger(request, errc::malformed_message,
                    "the request lacks the empty frame that a REQ socket puts in front");
    return true;
  }
  if (frames.size() != payload_begins + 1) {
    refuse_stranger(request, errc::malformed_message, "the request is not a single frame");
    return true;
  }
  if (const auto size = frames[payload_begins].size(); size > max_message_bytes_) {
    refuse_stranger(request, std::make_error_code(std::errc::message_size),
                    "the request has " + std::to_string(size) + " bytes, at most " +
                        std::to_string(max_message_bytes_) + " are taken");
    return true;
  }
  std::string_view problem;
  auto message = detail::parse_frame(bytes_of(frames[payload_begins]), problem);
  if (!problem.empty()) {
    refuse_stranger(request, errc::malformed_message, "the request is no side message: " + std::string(problem));
    return true;
  }
  hand_over(request, std::move(message));
  return true;
}

KVFERRY_INLINE void HandshakeListener::hand_over(const std::shared_ptr<ServedRequest>& request, SideMessage message) {
  using State = HandshakeService::Reply::State;
  try {
    on_request_(std::move(message), HandshakeService::Reply(std::make_unique<State>(State{mailbox_, request})));
  } catch (const std::system_error& error) {
    refuse(request, error.code(), error.what());
  } catch (const std::exception& error) {
    refuse(request, errc::handshake_failed, error.what());
  } catch (...) {
    refuse(request, errc::handshake_failed, "the request failed");
  }
}

KVFERRY_INLINE void HandshakeListener::refuse_stranger(const std::shared_ptr<ServedRequest>& request,
                                                       std::error_code ec, const std::string& text) {
  if (refusals_) {
    refusals_->count(ec, request->source, text);
  }
  refuse(request, ec, text);
}

KVFERRY_INLINE void HandshakeListener::refuse(const std::shared_ptr<ServedRequest>& request, std::error_code ec,
                                              const std::string& text) {
  // The exception that brought us here has destroyed the `Reply` on its way, unless the handler kept it or used it.
  using State = ServedRequest::State;
  if (request->advance(State::waiting, State::failed) || request->advance(State::dropped, State::failed)) {
    reply({request, State::failed, error_message(ec, text).encoded()});
  }
}

KVFERRY_INLINE void HandshakeListener::reply(const ReplyCommand& command) {
  if (command.request->state != command.state) {
    return;
  }
  const auto send = [&](const Bytes& answer) {
    const auto& connection = command.request->envelope.front();
    if (gate_.request_answered({reinterpret_cast<const char*>(connection.data()), connection.size()}, answer.size())) {
      socket_.send(command.request->envelope, answer);
    }
  };
  if (command.encoded.size() <= max_message_bytes_) {
    send(command.encoded);
    return;
  }
  const auto why = "the answer has " + std::to_string(command.encoded.size()) + " bytes, at most " +
                   std::to_string(max_message_bytes_) + " get through";
  send(error_message(std::make_error_code(std::errc::message_size), why).encoded());
}

}  // namespace kvferry::kit
