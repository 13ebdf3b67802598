// SPDX-License-Identifier: Apache-2.0
// The HandshakeService of programs that are linked without ZeroMQ: all services are in one process, each with its thread, and
// questions and answers go from one's queue to the other's. As with sockets, a question waits for a server until its deadline,
// and is lost with the server that has got it.
#include "handshakes.hpp"

#include <kvferry/kit/handshake_service.hpp>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>
#include <kvferry/url.hpp>

#include <kvferry/detail/side_message_error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
namespace {

std::atomic<std::size_t> to_lose{0};

std::function<void()> forget_services = [] {};

bool lost() {
  std::size_t left = to_lose;
  return left != 0 && to_lose.compare_exchange_strong(left, left - 1);
}

}  // namespace

struct HandshakeService::Impl {
  struct Question {
    std::string url;
    AnswerHandler on_answer;
  };
  struct Arrived {
    SideMessage question;
    Reply reply;
  };
  /// The asker and the number of a question.
  struct Asked {
    std::weak_ptr<Impl> asker;
    std::uint64_t number = 0;
  };
  using Open = std::multimap<std::chrono::steady_clock::time_point, std::pair<std::uint64_t, Question>>;

  void run() {
    std::unique_lock lock(mutex);
    while (!closed) {
      if (!arrived.empty()) {
        Arrived next = std::move(arrived.front());
        arrived.pop_front();
        lock.unlock();
        on_request(std::move(next.question), std::move(next.reply));
        lock.lock();
      } else if (!answers.empty()) {
        const auto [number, answer] = std::move(answers.front());
        answers.pop_front();
        const auto it = std::ranges::find(open, number, [](const auto& entry) { return entry.second.first; });
        if (it != open.end()) {
          Question question = std::move(it->second.second);
          open.erase(it);
          lock.unlock();
          hand_out(question, answer);
          lock.lock();
        }
      } else if (!open.empty() && open.begin()->first <= std::chrono::steady_clock::now()) {
        const Question question = std::move(open.begin()->second.second);
        open.erase(open.begin());
        lock.unlock();
        question.on_answer(errc::timed_out, {}, question.url + " has not answered in time", {});
        lock.lock();
      } else if (!open.empty()) {
        const auto next = open.begin()->first;
        something.wait_until(lock, next);
      } else {
        something.wait(lock);
      }
    }
    const auto dropped = std::exchange(arrived, {});
    const auto left = std::exchange(open, {});
    const auto lost_with_this = std::exchange(unanswered, {});
    lock.unlock();
    for (const auto& [number, asked] : lost_with_this) {
      if (const auto asker = asked.asker.lock()) {
        (void)asker->put([&, of = asked.number] { asker->answers.emplace_back(of, std::nullopt); });
      }
    }
    for (const auto& [deadline, entry] : left) {
      entry.second.on_answer(errc::closed, {}, "the channel was closed", {});
    }
  }

  static void hand_out(const Question& question, const std::optional<SideMessage>& answer) {
    if (!answer) {
      question.on_answer(errc::connection_lost, {}, "connection to " + question.url + " was lost", {});
    } else if (answer->is<SideMessageError>()) {
      const auto error = decode_side_message<SideMessageError>(*answer);
      question.on_answer(code_of(error), {}, question.url + " answered: " + error.message, "127.0.0.1");
    } else {
      question.on_answer({}, *answer, {}, "127.0.0.1");
    }
  }

  template <class Put>
  bool put(Put into_queue) {
    const std::lock_guard lock(mutex);
    if (!closed) {
      into_queue();
      something.notify_one();
    }
    return !closed;
  }

  /// Takes a question that was asked at this url.
  void take(const std::shared_ptr<Impl>& self, SideMessage question, const Asked& from);

  /// @return whether it was unanswered, and the service is open.
  bool answered(std::uint64_t arrival) {
    const std::lock_guard lock(mutex);
    return !closed && unanswered.erase(arrival) != 0;
  }

  void join() {
    if (thread.joinable()) {
      thread.join();
    }
  }

  RequestHandler on_request;
  std::string url;
  std::mutex mutex;
  std::condition_variable something;
  bool closed = false;
  std::deque<Arrived> arrived;
  std::deque<std::pair<std::uint64_t, std::optional<SideMessage>>> answers;
  std::map<std::uint64_t, Asked> unanswered;  ///< Questions of others', by arrival.
  Open open;
  std::uint64_t last = 0;
  std::mutex join_mutex;
  std::thread thread;

  struct Directory {
    std::mutex mutex;
    std::map<std::string, std::weak_ptr<Impl>> services;
    std::map<std::string, std::vector<std::pair<SideMessage, Asked>>> waiting;  ///< For a service, by url.
    std::uint16_t last_port = 0;
  };
  static Directory& directory() {
    static Directory all;
    return all;
  }
};

struct HandshakeService::Reply::State {
  std::weak_ptr<Impl> asked;
  std::uint64_t arrival = 0;
  Impl::Asked from;

  void send(const SideMessage& answer) const {
    const auto service = asked.lock();
    const auto asker = from.asker.lock();
    if (service && service->answered(arrival) && asker && !lost()) {
      (void)asker->put([&] { asker->answers.emplace_back(from.number, answer); });
    }
  }
};

void HandshakeService::Impl::take(const std::shared_ptr<Impl>& self, SideMessage question, const Asked& from) {
  const bool taken = put([&] {
    const std::uint64_t arrival = ++last;
    unanswered.emplace(arrival, from);
    arrived.push_back({std::move(question), Reply(std::make_unique<Reply::State>(Reply::State{self, arrival, from}))});
  });
  if (const auto asker = taken ? nullptr : from.asker.lock()) {
    (void)asker->put([&] { asker->answers.emplace_back(from.number, std::nullopt); });
  }
}

HandshakeService::Reply::Reply(std::unique_ptr<State> state) noexcept : state_(std::move(state)) {}
HandshakeService::Reply::Reply(Reply&&) noexcept = default;
HandshakeService::Reply& HandshakeService::Reply::operator=(Reply&& other) noexcept {
  const Reply replaced(std::exchange(state_, std::move(other.state_)));
  return *this;
}
HandshakeService::Reply::~Reply() {
  if (state_) {
    state_->send(encode_side_message(SideMessageError{static_cast<std::int64_t>(errc::handshake_failed), "dropped"}));
  }
}
void HandshakeService::Reply::operator()(const SideMessage& answer) {
  if (const auto state = std::move(state_)) {
    state->send(answer);
  }
}
std::string HandshakeService::Reply::source() const { return state_ ? "127.0.0.1" : std::string(); }
std::string HandshakeService::Reply::key() const { return {}; }

HandshakeService::HandshakeService(Options options, RequestHandler on_request) : impl_(std::make_shared<Impl>()) {
  forget_services = [] {
    Impl::directory().services.clear();
    Impl::directory().waiting.clear();
    Impl::directory().last_port = 0;
  };
  impl_->on_request = std::move(on_request);
  if (!options.bind_url.empty()) {
    auto& [mutex, services, waiting, last_port] = Impl::directory();
    const std::lock_guard lock(mutex);
    HostPort address = parse_url(options.bind_url);
    if (address.port == 0) {
      address.port = ++last_port;
    }
    impl_->url = address.to_url();
    services[impl_->url] = impl_;
    for (auto& [question, from] : std::exchange(waiting[impl_->url], {})) {
      impl_->take(impl_, std::move(question), from);
    }
  }
  impl_->thread = std::thread([impl = impl_.get()] { impl->run(); });
}

HandshakeService::~HandshakeService() { close(); }

std::string HandshakeService::bound_url() const { return impl_->url; }

void HandshakeService::ask(const std::string& url, SideMessage question, std::chrono::steady_clock::time_point deadline,
                           AnswerHandler on_answer, const std::string&) {
  std::uint64_t number = 0;
  const bool open = impl_->put([&] {
    number = ++impl_->last;
    impl_->open.emplace(deadline, std::pair(number, Impl::Question{url, on_answer}));
  });
  if (!open) {
    const std::lock_guard lock(impl_->join_mutex);
    impl_->join();
    impl_->thread = std::thread([on_answer] { on_answer(errc::closed, {}, "the channel was closed", {}); });
    return;
  }
  if (lost()) {
    return;
  }
  std::shared_ptr<Impl> asked;
  {
    auto& [mutex, services, waiting, last_port] = Impl::directory();
    const std::lock_guard lock(mutex);
    const auto it = services.find(url);
    asked = it == services.end() ? nullptr : it->second.lock();
    if (!asked) {
      waiting[url].emplace_back(question, Impl::Asked{impl_, number});
    }
  }
  if (asked) {
    asked->take(asked, std::move(question), {impl_, number});
  }
}

void HandshakeService::close() {
  {
    const std::lock_guard lock(impl_->mutex);
    impl_->closed = true;
    impl_->something.notify_all();
  }
  if (impl_->thread.get_id() != std::this_thread::get_id()) {
    const std::lock_guard lock(impl_->join_mutex);
    impl_->join();
  }
}

}  // namespace kvferry::kit

namespace kvferry::inline KVFERRY_ABI::schedules {

void reset_handshakes() { kit::forget_services(); }

void lose_handshake_messages(std::size_t count) { kit::to_lose = count; }

}  // namespace kvferry::schedules
