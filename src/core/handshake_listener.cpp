// SPDX-License-Identifier: Apache-2.0
#include "handshake_listener.hpp"

#include <algorithm>
#include <chrono>
#include <exception>
#include <iterator>
#include <tuple>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

#include "name_resolution.hpp"

namespace kvferry::kit {
namespace {

/// Requests that are taken before the questions have their turn.
constexpr int requests_a_turn = 64;
/// ZeroMQ's limit.
constexpr std::size_t longest_routing_id = 255;

Bytes copy_of(const zmq::message_t& frame) {
  const auto bytes = bytes_of(frame);
  return {bytes.begin(), bytes.end()};
}

/// The frames in front of the request: the identities that lead back to the peer and, last, the empty frame of its REQ.
/// Only the first identity if there is no empty frame.
std::vector<Bytes> envelope_of(const std::vector<zmq::message_t>& frames) {
  const auto ends_identities = [](const auto& frame) { return frame.size() == 0 || frame.size() > longest_routing_id; };
  const auto delimiter = std::find_if(frames.begin() + 1, frames.end(), ends_identities);
  const bool complete = delimiter != frames.end() && delimiter->size() == 0;
  std::vector<Bytes> envelope;
  std::transform(frames.begin(), complete ? delimiter + 1 : frames.begin() + 1, std::back_inserter(envelope), copy_of);
  return envelope;
}

SideMessage error_message(std::error_code ec, const std::string& text) {
  const bool is_own = ec.category() == error_category();
  return encode_side_message(SideMessageError{is_own ? ec.value() : static_cast<int>(errc::handshake_failed), text});
}

}  // namespace

HandshakeListener::HandshakeListener(const SharedContext& context, const HandshakeService::Options& options,
                                     HandshakeService::RequestHandler on_request,
                                     std::weak_ptr<HandshakeMailbox> mailbox)
    : max_message_bytes_(options.max_message_bytes),
      socket_(context, zmq::socket_type::router, options.max_message_bytes),
      monitor_(context, socket_, ZMQ_EVENT_CLOSED),
      on_request_(std::move(on_request)),
      mailbox_(std::move(mailbox)) {
  // A peer that names itself and comes back before its old connection is known to be dead gets through.
  socket_.ref().set(zmq::sockopt::router_handover, true);
  auto url = parse_url(options.bind_url);
  url.port = socket_.bind(listening_address(url));
  bound_url_ = url.to_url();
}

HandshakeListener::~HandshakeListener() {
  constexpr std::chrono::seconds longest_wait{1};
  try {
    socket_.unbind();
    std::ignore = monitor_.receive(longest_wait);
  } catch (const zmq::error_t&) {
    // The context is being terminated, and the port goes with it.
  }
}

void HandshakeListener::serve() {
  for (int served = 0; served < requests_a_turn && serve_one(); ++served) {
  }
}

bool HandshakeListener::serve_one() {
  const auto frames = socket_.receive();
  if (frames.empty()) {
    return false;
  }
  auto envelope = envelope_of(frames);
  const auto payload_begins = envelope.size();
  const bool has_delimiter = payload_begins > 1;
  const auto request = std::make_shared<ServedRequest>(std::move(envelope));
  if (!has_delimiter) {
    refuse(request, errc::malformed_message, "the request lacks the empty frame that a REQ socket puts in front");
    return true;
  }
  if (frames.size() != payload_begins + 1) {
    refuse(request, errc::malformed_message, "the request is not a single frame");
    return true;
  }
  std::string_view problem;
  auto message = detail::parse_frame(bytes_of(frames[payload_begins]), problem);
  if (!problem.empty()) {
    refuse(request, errc::malformed_message, "the request is no side message: " + std::string(problem));
    return true;
  }
  hand_over(request, std::move(message));
  return true;
}

void HandshakeListener::hand_over(const std::shared_ptr<ServedRequest>& request, SideMessage message) {
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

void HandshakeListener::refuse(const std::shared_ptr<ServedRequest>& request, std::error_code ec,
                               const std::string& text) const {
  // The exception that brought us here has destroyed the `Reply` on its way, unless the handler kept it or used it.
  using State = ServedRequest::State;
  if (request->advance(State::waiting, State::failed) || request->advance(State::dropped, State::failed)) {
    reply({request, State::failed, error_message(ec, text).encoded()});
  }
}

void HandshakeListener::reply(const ReplyCommand& command) const {
  if (command.request->state != command.state) {
    return;
  }
  if (command.encoded.size() <= max_message_bytes_) {
    socket_.send(command.request->envelope, command.encoded);
    return;
  }
  const auto why = "the answer has " + std::to_string(command.encoded.size()) + " bytes, at most " +
                   std::to_string(max_message_bytes_) + " get through";
  socket_.send(command.request->envelope, error_message(std::make_error_code(std::errc::message_size), why).encoded());
}

}  // namespace kvferry::kit
