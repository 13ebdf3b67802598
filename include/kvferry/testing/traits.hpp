// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <concepts>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include <kvferry/base_transfer_channel.hpp>
#include <kvferry/channel_options.hpp>
#include <kvferry/testing/own_loopback.hpp>

#if defined(__SANITIZE_THREAD__)
#define KVFERRY_TESTING_THREAD_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define KVFERRY_TESTING_THREAD_SANITIZED 1
#endif
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define KVFERRY_TESTING_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define KVFERRY_TESTING_SANITIZED 1
#endif
#endif

namespace kvferry::inline KVFERRY_ABI::testing {

/// Whether a sanitizer that slows memory accesses down and needs memory of its own is active.
#ifdef KVFERRY_TESTING_SANITIZED
inline constexpr bool sanitized = true;
#else
inline constexpr bool sanitized = false;
#endif

/// A test's function that answers side messages in place of `handle_init_side_msg`.
using SideMessageAnswer = std::function<SideMessage(const SideMessage&)>;

/// Makes a transport's channels for the conformance suite. Each test has one object of this type. It outlives all
/// channels that it made, so it may own their executor (an `asio::io_context` and the thread that runs it). Its
/// destructor must not discard handlers that are still queued there: the suite waits for them.
///
/// Required: `make_channel`, static or not. It may throw the exceptions of the channel's constructor. It must pass on
/// all options, also `ChannelOptions::executor` if the test set it.
///
/// Optional members, with the suite's defaults:
/// @code
/// static constexpr std::string_view name;                   // in the tests' names; the number of the type
/// static std::string listen_url();                          // own_loopback_url()
/// static constexpr std::chrono::milliseconds wait_limit;    // 30 s, under sanitizers 90 s: a handler that did not run by
///                                                           // then is lost
/// static constexpr bool reconnects;                         // false: transfers reconnect by themselves (kit)
/// static constexpr bool notices_blocking_in_handler;        // false: errc::would_deadlock instead of a deadlock
/// std::unique_ptr<BaseTransferChannel> make_answering_channel(ChannelOptions, SideMessageAnswer);
///                                                           // see AnsweringChannel; its tests are skipped without
/// std::shared_ptr<std::byte> allocate(std::size_t);         // new: memory for a node's region
/// static bool takes(std::string_view suite);                // true: of a set-up that differs from another one of the same
///                                                           // transport, which takes all, in what only some suites touch
/// @endcode
template <class T>
concept ConformanceTraits = std::default_initializable<T> && requires(T traits, ChannelOptions options) {
  { traits.make_channel(std::move(options)) } -> std::convertible_to<std::unique_ptr<BaseTransferChannel>>;
};

/// A channel that answers side messages by a function, for `Traits::make_answering_channel`. The suite's options for it
/// have `ChannelOptions::hold_side_messages`.
/// @code
/// return std::make_unique<kvferry::testing::AnsweringChannel<MyChannel>>(std::move(answer), std::move(options));
/// @endcode
template <class Channel>
class AnsweringChannel final : public Channel {
 public:
  template <class... Args>
  explicit AnsweringChannel(SideMessageAnswer answer, Args&&... args)
      : Channel(std::forward<Args>(args)...), answer_(std::move(answer)) {
    if constexpr (requires { this->answer_side_messages(); }) {
      this->answer_side_messages();
    }
  }
  /// No message may reach a half-destroyed object.
  ~AnsweringChannel() override { this->close(); }

  SideMessage handle_init_side_msg(const SideMessage& message) override {
    auto answer = answer_(message);
    return answer.type().empty() ? Channel::handle_init_side_msg(message) : answer;
  }

 private:
  SideMessageAnswer answer_;
};

/// The facts about a traits type, with the defaults for those it does not state.
struct TraitsFacts {
  std::string listen_url = own_loopback_url();
  std::chrono::milliseconds wait_limit{sanitized ? 90'000 : 30'000};
  bool reconnects = false;
  bool notices_blocking_in_handler = false;
  bool answers_side_messages = false;

  template <ConformanceTraits Traits>
  [[nodiscard]] static TraitsFacts of() {
    TraitsFacts facts;
    if constexpr (requires {
                    { Traits::listen_url() } -> std::convertible_to<std::string>;
                  }) {
      facts.listen_url = Traits::listen_url();
    }
    if constexpr (requires { std::chrono::milliseconds(Traits::wait_limit); }) {
      facts.wait_limit = Traits::wait_limit;
    }
    if constexpr (requires {
                    { Traits::reconnects } -> std::convertible_to<bool>;
                  }) {
      facts.reconnects = Traits::reconnects;
    }
    if constexpr (requires {
                    { Traits::notices_blocking_in_handler } -> std::convertible_to<bool>;
                  }) {
      facts.notices_blocking_in_handler = Traits::notices_blocking_in_handler;
    }
    facts.answers_side_messages = requires(Traits traits, ChannelOptions options, SideMessageAnswer answer) {
      traits.make_answering_channel(std::move(options), std::move(answer));
    };
    return facts;
  }
};

/// `Traits::name`; the number where there is none.
template <class Traits>
[[nodiscard]] std::string name_of(int number) {
  if constexpr (requires { std::string(Traits::name); }) {
    return std::string(Traits::name);
  } else {
    return std::to_string(number);
  }
}

}  // namespace kvferry::testing
