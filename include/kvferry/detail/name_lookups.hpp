// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/ip/address.hpp>

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// Asks the system's resolver for a host's addresses: one family after the other in turns, each address once, the
/// resolver's first choice first (RFC 8305, section 4). Blocks for as long as the resolver does.
[[nodiscard]] std::vector<asio::ip::address> look_up(const std::string& host, std::error_code& ec);

/// A channel's lookups of names. `getaddrinfo` alone knows all that a system finds names by (nsswitch.conf), and can't be
/// interrupted. So each name has a thread while it is looked up, and a thread whose lookup takes longer than the channel
/// lives is left behind: it owns all that it touches, neither `close` nor the process's exit waits for it, and whoever
/// looks up or closes next joins it once it is done.
///
/// A name that is being looked up is not looked up a second time: whoever asks for it gets the answer that comes.
///
/// Thread safety: all member functions may be called from any thread.
class KVFERRY_EXPORT NameLookups {
 public:
  using Clock = std::chrono::steady_clock;
  /// Runs on the lookup's thread, or on one that calls `look_up`: must neither block nor call into this.
  using Handler = std::function<void(std::error_code, const std::vector<asio::ip::address>&)>;

  /// Names whose askers still wait that are looked up at a time; further ones wait for their turn.
  static constexpr std::size_t max_awaited = 64;
  /// Lookups at a time in all, with those that nobody waits for any more.
  static constexpr std::size_t max_threads = 256;

  NameLookups();
  NameLookups(const NameLookups&) = delete;
  NameLookups& operator=(const NameLookups&) = delete;
  ~NameLookups() { close(); }

  /// Looks `host` up, and hands the outcome to `on_result`, once at most: never after `close`.
  /// @param deadline when the asker will have stopped waiting.
  void look_up(const std::string& host, Clock::time_point deadline, Handler on_result);

  /// Starts what waits for others that nobody waits for any more. Each call of `look_up` does so too.
  void start_waiting();

  /// Leaves everything behind that isn't done; when it returns, no handler runs or will. Does not wait for the resolver.
  /// Idempotent.
  void close();

  /// Joins those threads of channels that were closed, in the whole process, that are done by now.
  /// @return how many are not.
  static std::size_t join_left_behind();

 private:
  struct Lookup;
  struct State;

  const std::shared_ptr<State> state_;
};

}  // namespace kvferry::kit
