// SPDX-License-Identifier: Apache-2.0
// How a rail ends: by itself, or with leave taken of the peer.
#include <algorithm>
#include <array>
#include <utility>

#include <kvferry/error.hpp>

#include "rail.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

void Rail::hold() {
  driver_.change([&] {
    owner_.reset();  // it knows
    held_ = true;
  });
  drive(callers_turn);
}

bool Rail::say(Farewell what) {
  bool done = false;
  driver_.change([&] {
    if (failed_ || phase_ != Phase::running) {
      done = true;
      return;
    }
    if (!leaving_) {
      leaving_ = true;
      protocol_->leave();
      events_.release();  // whoever leaves waits for the descriptor itself
    }
    pair_->take_events();
    const auto step = [&] {
      settle();
      protocol_->begin_fences(protocol_->fences_asked());  // what isn't known here by now is never posted
      while (!speechless_ && protocol_->fill_answers(list_)) {
        post_farewell();
      }
      const bool answered = speechless_ || protocol_->settled();
      if (answered && what == Farewell::goodbye && !said_goodbye_ && !speechless_ &&
          protocol_->fill_message(list_, MessageType::goodbye, 0, 0)) {
        said_goodbye_ = true;
        post_farewell();
      }
      return speechless_ || (what == Farewell::answers && said_goodbye_) ||
             (protocol_->settled() && (what == Farewell::answers || said_goodbye_));
    };
    done = step();
    if (!done) {
      speechless_ = speechless_ || pair_->arm();
      done = step();  // what completed before has no event
    }
  });
  drive(callers_turn);
  return done;
}

int Rail::event_descriptor() {
  int descriptor = -1;
  driver_.change([&] {
    if (!failed_ && !speechless_) {
      descriptor = pair_->event_descriptor();
    }
  });
  drive(callers_turn);
  return descriptor;
}

void Rail::shut(std::error_code cause, const std::string& why) {
  driver_.change([&] {
    owner_.reset();
    if (!failed_) {
      if (phase_ == Phase::running) {
        protocol_->leave();
        settle();
      }
      end_all(cause, why, 0);
    }
  });
  drive(callers_turn);
}

/// Takes what has completed and what the peer has answered, of a rail that is leaving.
void Rail::settle() {
  std::array<ibv_wc, poll_batch> completions;
  for (int count = 1; !speechless_ && count > 0;) {
    count = pair_->poll(completions);
    speechless_ = count < 0;
    const auto taken = std::span(completions).first(static_cast<std::size_t>(std::max(count, 0)));
    for (const ibv_wc& completion : taken) {
      if (completion.status != IBV_WC_SUCCESS) {
        speechless_ = true;
        return;
      }
      if (!QueuePair::is_receive(completion)) {
        protocol_->completed();
      } else if (!QueuePair::is_message(completion) || protocol_->received(pair_->message(completion))) {
        speechless_ = true;  // a goodbye of its own, or nonsense
        return;
      }
    }
    // The next message tells the peer of them.
    speechless_ = speechless_ || pair_->post_receives(taken);
  }
}

void Rail::post_farewell() { speechless_ = speechless_ || pair_->post(list_); }

void Rail::fail(std::error_code cause, std::string why, std::uint64_t culprit) {
  if (failed_) {
    return;
  }
  if (auto owner = std::exchange(owner_, {}).lock()) {
    owner->rail_breaking(RailProtocol::cause_for_others(cause, culprit));
    told_owner_ = std::move(owner);
  }
  end_all(cause, std::move(why), culprit);
}

void Rail::end_all(std::error_code cause, std::string why, std::uint64_t culprit) {
  failed_ = true;
  failure_ = RailProtocol::cause_for_others(cause, culprit);  // the operations on the other rails aren't to blame
  failure_why_ = std::move(why);
  timer_.cancel();
  if (events_.is_open()) {
    events_.release();  // the descriptor is the completion channel's
  }
  probes_.clear();
  // First the queue pair: without it the adapter reaches no memory. Then the operations.
  pair_.reset();
  if (protocol_) {
    protocol_->fail(cause, failure_why_, culprit);
  }
}

}  // namespace kvferry::rdma
