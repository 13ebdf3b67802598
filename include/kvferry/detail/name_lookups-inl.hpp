// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/detail/name_lookups.hpp>

#include <dlfcn.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <asio/error.hpp>
#include <asio/ip/tcp.hpp>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include <kvferry/error.hpp>

#include <kvferry/detail/thread.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {
inline namespace internal {

KVFERRY_INLINE std::error_code error_of(int resolver_code, int system_code) {
  switch (resolver_code) {
    case 0: return {};
    case EAI_AGAIN: return asio::error::host_not_found_try_again;
    case EAI_FAIL: return asio::error::no_recovery;
    case EAI_MEMORY: return std::make_error_code(std::errc::not_enough_memory);
    case EAI_SYSTEM: return {system_code, std::system_category()};
    default: return asio::error::host_not_found;
  }
}

/// The other family's addresses between those of the first one's.
KVFERRY_INLINE std::vector<asio::ip::address> interleaved(const std::vector<asio::ip::address>& found) {
  std::deque<asio::ip::address> first;
  std::deque<asio::ip::address> other;
  for (const auto& address : found) {
    auto& family = address.is_v4() == found.front().is_v4() ? first : other;
    if (std::ranges::find(family, address) == family.end()) {
      family.push_back(address);
    }
  }
  std::vector<asio::ip::address> addresses;
  while (!first.empty() || !other.empty()) {
    for (auto* family : {&first, &other}) {
      if (!family->empty()) {
        addresses.push_back(family->front());
        family->pop_front();
      }
    }
  }
  return addresses;
}

}  // namespace internal

KVFERRY_INLINE std::vector<asio::ip::address> look_up(const std::string& host, std::error_code& ec) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_ADDRCONFIG;
  addrinfo* list = nullptr;
  const int failed = ::getaddrinfo(host.c_str(), nullptr, &hints, &list);
  ec = error_of(failed, errno);
  if (failed != 0 && host == "localhost") {
    // RFC 6761, 6.3: whatever the system says. A container without /etc/hosts says nothing.
    ec = {};
    return {asio::ip::address_v4::loopback(), asio::ip::address_v6::loopback()};
  }
  if (failed != 0) {
    return {};
  }
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owned(list, &::freeaddrinfo);
  std::vector<asio::ip::address> found;
  for (const addrinfo* entry = list; entry != nullptr; entry = entry->ai_next) {
    asio::ip::tcp::endpoint endpoint;
    if ((entry->ai_family == AF_INET || entry->ai_family == AF_INET6) && entry->ai_addrlen <= endpoint.capacity()) {
      std::memcpy(endpoint.data(), entry->ai_addr, entry->ai_addrlen);
      found.push_back(endpoint.address());
    }
  }
  if (found.empty()) {
    ec = asio::error::host_not_found;
  }
  return interleaved(found);
}

/// All but the handlers is touched under its state's mutex, or by its own thread.
struct NameLookups::Lookup {
  Lookup(std::string name, Clock::time_point until) : host(std::move(name)), deadline(until) {}

  const std::string host;
  Clock::time_point deadline;  ///< The last of its askers'.
  std::vector<Handler> handlers;
  std::thread thread;
  std::atomic<bool> done{false};
};

struct NameLookups::State {
  using Lookups = std::vector<std::shared_ptr<Lookup>>;

  struct LeftBehind;

  /// @return nothing if the name isn't being looked up, or about to be.
  [[nodiscard]] std::shared_ptr<Lookup> find(const std::string& host) const {
    for (const auto* lookups : {&running, &waiting}) {
      const auto found =
          std::ranges::find_if(*lookups, [&](const auto& lookup) { return lookup->host == host && !lookup->done; });
      if (found != lookups->end()) {
        return *found;
      }
    }
    return nullptr;
  }

  void join_done() {
    std::erase_if(running, [](const auto& lookup) {
      if (lookup->done) {
        lookup->thread.join();
      }
      return lookup->done.load();
    });
  }

  /// Starts as many of those that wait as there is room for.
  void start_waiting(const std::shared_ptr<State>& self) {
    const auto now = Clock::now();
    std::erase_if(waiting, [now](const auto& lookup) { return lookup->deadline <= now; });
    while (!waiting.empty()) {
      const auto busy =
          static_cast<std::size_t>(std::ranges::count_if(running, [](const auto& lookup) { return !lookup->done; }));
      const auto awaited = static_cast<std::size_t>(std::ranges::count_if(
          running, [now](const auto& lookup) { return !lookup->done && lookup->deadline > now; }));
      if (awaited >= max_awaited || busy >= max_threads) {
        return;
      }
      const auto lookup = waiting.front();
      waiting.erase(waiting.begin());
      running.push_back(lookup);
      try {
        lookup->thread = start_thread("kvferry-names", [self, lookup] { run(*self, self, *lookup); });
      } catch (const std::system_error& error) {
        running.pop_back();
        answer(*lookup, error.code(), {});
      }
    }
  }

  static void run(State& state, const std::shared_ptr<State>& self, Lookup& lookup) {
    std::error_code ec;
    std::vector<asio::ip::address> addresses;
    try {
      addresses = kit::look_up(lookup.host, ec);
    } catch (const std::exception&) {
      ec = std::make_error_code(std::errc::not_enough_memory);
    }
    const std::lock_guard lock(state.mutex);
    answer(lookup, ec, addresses);
    lookup.done = true;
    if (!state.closed) {
      state.start_waiting(self);
    }
  }

  static void answer(Lookup& lookup, std::error_code ec, const std::vector<asio::ip::address>& addresses) {
    for (auto& handler : std::exchange(lookup.handlers, {})) {
      try {
        handler(ec, addresses);
      } catch (const std::exception&) {
        // Out of memory: whoever waits for this hears from its deadline.
      }
    }
  }

  const pid_t process = ::getpid();
  std::mutex mutex;
  bool closed = false;
  Lookups running;
  Lookups waiting;
};

/// Lookups that outlive their channels. Never destroyed: exit waits for nothing, and a thread that the resolver
/// lets go meanwhile finds its state.
struct NameLookups::State::LeftBehind {
  explicit LeftBehind(LeftBehind* of_parent) : parents(of_parent) {}

  /// This process's. A forked child has none of its parent's threads and can't tell in what state their locks are.
  static LeftBehind& here() {
    static std::atomic<LeftBehind*> current{nullptr};
    auto* found = current.load();
    if (found == nullptr || found->process != ::getpid()) {
      auto made = std::make_unique<LeftBehind>(found);
      if (current.compare_exchange_strong(found, made.get())) {
        found = made.release();
      }
    }
    return *found;
  }

  /// The library's code has to be there when the resolver returns, though it be a plugin that is unloaded by then.
  static void stay_loaded() {
    Dl_info info{};
    if (::dladdr(reinterpret_cast<const void*>(&stay_loaded), &info) != 0 && info.dli_fname != nullptr) {
      ::dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
    }
  }

  void add(const Lookups& lookups) {
    stay_loaded();
    const std::lock_guard lock(mutex);
    all.insert(all.end(), lookups.begin(), lookups.end());
  }

  std::size_t join_done() {
    const std::lock_guard lock(mutex);
    std::erase_if(all, [](const auto& lookup) {
      if (lookup->done) {
        lookup->thread.join();
      }
      return lookup->done.load();
    });
    return all.size();
  }

  LeftBehind* const parents;  ///< To keep it reachable.
  const pid_t process = ::getpid();
  std::mutex mutex;
  Lookups all;
  std::vector<std::shared_ptr<State>> inherited;  ///< By a fork.
};

KVFERRY_INLINE NameLookups::NameLookups() : state_(std::make_shared<State>()) {}

KVFERRY_INLINE void NameLookups::look_up(const std::string& host, Clock::time_point deadline, Handler on_result) {
  const std::size_t left_behind = join_left_behind();
  const std::lock_guard lock(state_->mutex);
  if (state_->closed) {
    return;
  }
  if (left_behind >= max_threads) {
    on_result(errc::resource_limit, {});
    return;
  }
  state_->join_done();
  auto lookup = state_->find(host);
  if (!lookup) {
    lookup = std::make_shared<Lookup>(host, deadline);
    state_->waiting.push_back(lookup);
  }
  lookup->deadline = std::max(lookup->deadline, deadline);
  lookup->handlers.push_back(std::move(on_result));
  state_->start_waiting(state_);
}

KVFERRY_INLINE void NameLookups::start_waiting() {
  const std::lock_guard lock(state_->mutex);
  state_->start_waiting(state_);
}

KVFERRY_INLINE void NameLookups::close() {
  auto& left_behind = State::LeftBehind::here();
  if (state_->process != ::getpid()) {
    const std::lock_guard lock(left_behind.mutex);
    if (std::ranges::find(left_behind.inherited, state_) == left_behind.inherited.end()) {
      left_behind.inherited.push_back(state_);
    }
    return;
  }
  State::Lookups unfinished;
  std::vector<Handler> dropped;  // destroyed without the lock: they may own what takes it
  {
    const std::lock_guard lock(state_->mutex);
    state_->closed = true;
    for (const auto* lookups : {&state_->running, &state_->waiting}) {
      for (const auto& lookup : *lookups) {
        std::ranges::move(std::exchange(lookup->handlers, {}), std::back_inserter(dropped));
      }
    }
    state_->waiting.clear();
    state_->join_done();
    unfinished.swap(state_->running);
  }
  if (!unfinished.empty()) {
    left_behind.add(unfinished);
  }
}

KVFERRY_INLINE std::size_t NameLookups::join_left_behind() { return State::LeftBehind::here().join_done(); }

}  // namespace kvferry::kit
