// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/kit/handshake_service.hpp>

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>

#include <kvferry/detail/process.hpp>
#include <kvferry/detail/thread.hpp>
#include <kvferry/handshake/curve.hpp>
#include <kvferry/handshake/handshake_listener.hpp>
#include <kvferry/handshake/handshake_mailbox.hpp>
#include <kvferry/handshake/handshake_questions.hpp>
#include <kvferry/handshake/handshake_sockets.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

/// The service whose thread this is.
KVFERRY_INLINE thread_local const void* serving_here = nullptr;

inline constexpr const char* thread_name = "kvferry-zmq";

template <class... Functions>
struct Overloaded : Functions... {
  using Functions::operator()...;
};
template <class... Functions>
Overloaded(Functions...) -> Overloaded<Functions...>;

/// Until the deadline, in ZeroMQ's milliseconds: rounded up, lest the last one be spent polling.
KVFERRY_INLINE long poll_timeout(const std::optional<HandshakeQuestions::TimePoint>& deadline) {
  if (!deadline) {
    return -1;
  }
  constexpr std::chrono::milliseconds longest = std::chrono::hours(1);
  const auto now = std::chrono::steady_clock::now();
  if (*deadline <= now) {
    return 0;
  }
  return std::min(std::chrono::ceil<std::chrono::milliseconds>(*deadline - now), longest).count();
}

}  // namespace internal

struct HandshakeService::Impl {
  Impl(const Options& options, RequestHandler on_request)
      : context(options.keyring ? SharedContext::of_its_own() : SharedContext(options.zmq_context)),
        mailbox(std::make_shared<HandshakeMailbox>()),
        questions(context, options.max_message_bytes, mailbox, options.keyring) {
    if (options.bind_url.empty()) {
      return;
    }
    try {
      if (options.keyring) {
        key_check.emplace(context, options.keyring, options.refusals);
      }
      listener.emplace(context, options, std::move(on_request), mailbox);
    } catch (const TransferError&) {
      throw;
    } catch (const std::system_error& error) {
      throw TransferError(error.code(), "cannot listen at " + options.bind_url);
    } catch (const zmq::error_t& error) {
      throw TransferError(error_code_of(error), "cannot listen at " + options.bind_url);
    }
    bound_url = listener->bound_url();
  }

  void start() {
    thread = start_thread(thread_name, [this] { run(); });
  }

  void run() {
    serving_here = this;
    while (!mailbox->closed()) {
      try {
        take_turn();
      } catch (const zmq::error_t& error) {
        if (error.num() == ETERM) {
          // The user terminates the context and waits for the sockets to go.
          mailbox->close();
        } else {
          rest_after_exception();
        }
      } catch (...) {
        rest_after_exception();
      }
    }
    listener.reset();
    key_check.reset();
    questions.close();
    end_what_is_left();
  }

  /// Out of memory or of descriptors, say. Handshakes go on when there are some again.
  static void rest_after_exception() noexcept {
    constexpr int milliseconds = 100;
    kvferry::detail::log_exception("on the thread for handshakes");
    (void)::poll(nullptr, 0, milliseconds);
  }

  void end_what_is_left() {
    do {
      for (const auto& command : mailbox->take()) {
        if (const auto* question = std::get_if<Question>(&command)) {
          end_with_closed(*question);
        }
      }
    } while (!mailbox->retire());
  }

  void take_turn() {
    poll_items.assign(1, {nullptr, mailbox->event_fd(), ZMQ_POLLIN, 0});
    if (listener) {
      const auto items = listener->poll_items();
      poll_items.insert(poll_items.end(), items.begin(), items.end());
    }
    if (key_check) {
      poll_items.push_back({key_check->ref().handle(), 0, ZMQ_POLLIN, 0});
    }
    const auto first_question = poll_items.size();
    questions.append_poll_items(poll_items);
    const auto count = static_cast<int>(poll_items.size());
    if (zmq_poll(poll_items.data(), count, poll_timeout(next_deadline())) < 0) {
      if (zmq_errno() == EINTR) {
        return;
      }
      throw zmq::error_t();
    }
    if (key_check) {
      key_check->serve();
    }
    questions.serve(std::span(poll_items).subspan(first_question));
    if (listener && (poll_items[1].revents != 0 || poll_items[2].revents != 0)) {
      listener->serve();
    }
    if (poll_items[0].revents != 0) {
      obey(mailbox->take());
    }
    const auto now = std::chrono::steady_clock::now();
    questions.expire(now);
    if (listener) {
      listener->expire(now);
    }
  }

  [[nodiscard]] std::optional<HandshakeQuestions::TimePoint> next_deadline() const {
    const auto of_questions = questions.next_deadline();
    const auto of_listener = listener ? listener->next_deadline() : std::nullopt;
    return of_questions && of_listener ? std::min(of_questions, of_listener)
           : of_questions              ? of_questions
                                       : of_listener;
  }

  void obey(std::vector<Command> commands) {
    const Overloaded obey_one{
        [this](ReplyCommand& command) { listener->reply(command); },
        [this](Question& question) { start(question); },
        [this](ResolvedCommand& command) { questions.resolved(std::move(command)); },
    };
    for (auto& command : commands) {
      try {
        std::visit(obey_one, command);
      } catch (...) {
        kvferry::detail::log_exception("on the thread for handshakes");  // the others are obeyed all the same
      }
    }
  }

  void start(Question& question) {
    try {
      questions.start(std::move(question));
    } catch (const std::bad_alloc&) {
      question.on_answer(std::make_error_code(std::errc::not_enough_memory), {}, {}, {});
    }
  }

  void ask(Question question) {
    Command command = std::move(question);
    if (mailbox->post(command)) {
      return;
    }
    // Closed, and the thread has ended or is about to: the question needs a thread that tells its handler.
    const std::lock_guard lock(thread_mutex);
    if (mailbox->post(command)) {
      return;
    }
    join_thread();
    const auto late = std::make_shared<Question>(std::get<Question>(std::move(command)));
    try {
      thread = start_thread(thread_name, [this, late] {
        serving_here = this;
        mailbox->reopen();
        end_with_closed(*late);
        end_what_is_left();
      });
    } catch (const std::system_error&) {
      end_with_closed(*late);  // there can't be a thread: then on this one
    }
  }

  void close() {
    mailbox->close();
    if (serving_here != this) {
      const std::lock_guard lock(thread_mutex);
      join_thread();
    }
  }

  void join_thread() {
    if (thread.joinable()) {
      thread.join();
    }
  }

  const ProcessOfOrigin origin;
  SharedContext context;
  std::shared_ptr<HandshakeMailbox> mailbox;
  HandshakeQuestions questions;
  std::optional<KeyCheck> key_check;
  std::optional<HandshakeListener> listener;
  std::string bound_url;
  std::vector<zmq_pollitem_t> poll_items;
  std::mutex thread_mutex;
  std::thread thread;
};

// NOLINTNEXTLINE(performance-unnecessary-value-param): most of it is copied
KVFERRY_INLINE HandshakeService::HandshakeService(Options options, RequestHandler on_request) {
  try {
    impl_ = std::make_shared<Impl>(options, std::move(on_request));
    impl_->start();
  } catch (const TransferError&) {
    throw;
  } catch (const zmq::error_t& error) {
    throw TransferError(error_code_of(error), "handshakes: ZeroMQ");
  } catch (const std::system_error& error) {
    throw TransferError(error.code(), "handshakes: no thread");
  }
}

KVFERRY_INLINE HandshakeService::~HandshakeService() {
  if (impl_->origin.was_forked()) {
    keep_inherited(std::move(impl_));
  } else {
    close();
  }
}

KVFERRY_INLINE std::string HandshakeService::bound_url() const { return impl_->bound_url; }

KVFERRY_INLINE void HandshakeService::ask(const std::string& url, SideMessage question,
                                          std::chrono::steady_clock::time_point deadline, AnswerHandler on_answer,
                                          const std::string& peer_id) {
  if (impl_->origin.was_forked()) {
    on_answer(errc::forked, {}, "the question's channel belongs to the process that this one was forked from", {});
    return;
  }
  impl_->ask({url, std::move(question), std::chrono::steady_clock::now(), deadline, std::move(on_answer), peer_id});
}

KVFERRY_INLINE void HandshakeService::close() {
  if (!impl_->origin.was_forked()) {
    impl_->close();
  }
}

}  // namespace kvferry::kit
