// SPDX-License-Identifier: Apache-2.0
#pragma once

// The first message to a url where nobody has answered as kvferry yet.
#include <functional>
#include <utility>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include <kvferry/kit/init_messages.hpp>
#include <kvferry/kit/peer.hpp>
#include <kvferry/kit/peer_attempts-inl.hpp>
#include <kvferry/kit/peer_directory.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// More than a channel has peers; those that are forgotten are greeted once more.
inline constexpr std::size_t most_urls = 16384;

/// The greeting has taken some.
KVFERRY_INLINE SideMessage with_time_left(const SideMessage& message, Clock::time_point deadline) {
  auto question = decode_side_message<InitQuestion>(message);
  if (question.timeout_ms) {
    question.timeout_ms = milliseconds_until(deadline);
  }
  return encode_side_message(question);
}

}  // namespace internal

/// With the lock held.
KVFERRY_INLINE void PeerDirectory::remember_kvferry(const std::string& url) {
  if (kvferry_urls_.size() >= most_urls) {
    kvferry_urls_.clear();
  }
  kvferry_urls_.insert(url);
}

/// Not to be called with the lock held.
KVFERRY_INLINE void PeerDirectory::ask_there(const std::string& peer_id, const std::string& url,
                                             const SideMessage& question, Clock::time_point deadline,
                                             std::function<bool()> wanted, HandshakeService::AnswerHandler on_answer) {
  bool known = false;
  {
    const Lock lock(mutex_);
    known = kvferry_urls_.contains(url);
  }
  if (known) {
    service_->ask(url, question, deadline, std::move(on_answer), peer_id);
    return;
  }
  service_->ask(
      url, encode_side_message(Greeting{own_init_url_, protocol_version}), deadline,
      [weak = weak_from_this(), peer_id, url, question, deadline, wanted = std::move(wanted),
       on_answer = std::move(on_answer)](std::error_code ec, const SideMessage& answer, std::string diagnostic,
                                         const std::string& reached) {
        if (const Visit self(weak); self && !wanted()) {
          // Another attempt may have connected the two: the question would be taken for a stranger's.
          on_answer(errc::cancelled, {}, {}, reached);
        } else if (self) {
          self->greeted(peer_id, url, question, deadline, on_answer, {ec, std::move(diagnostic)}, answer, reached);
        } else {
          on_answer(errc::closed, {}, {}, {});
        }
      },
      peer_id);
}

KVFERRY_INLINE void PeerDirectory::greeted(const std::string& peer_id, const std::string& url,
                                           const SideMessage& question, Clock::time_point deadline,
                                           HandshakeService::AnswerHandler on_answer, Failure failure,
                                           const SideMessage& answer, const std::string& reached_address) {
  // A listener that answers with kvferry's error is none of LMCache's.
  if (failure && failure.code != errc::unhandled_side_message) {
    on_answer(failure.code, {}, std::move(failure.sentence), reached_address);
    return;
  }
  if (!failure && answer.is<GreetingAnswer>()) {
    std::error_code ec;
    const auto read = decode_side_message<GreetingAnswer>(answer, ec);
    if (ec || !read.kvferry) {
      on_answer(errc::handshake_failed, {},
                url + " answers as LMCache's py_socket channel does, which has no data path; it was sent nothing else",
                reached_address);
      return;
    }
  }
  {
    const Lock lock(mutex_);
    remember_kvferry(url);
  }
  // A name may have the addresses of several servers: the one that was greeted is asked.
  std::error_code ignored;
  const auto there = HostPort{reached_address, parse_url(url, ignored).port}.to_url();
  service_->ask(reached_address.empty() ? url : there, with_time_left(question, deadline), deadline,
                std::move(on_answer), peer_id);
}

}  // namespace kvferry::kit
