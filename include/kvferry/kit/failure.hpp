// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_KIT_FAILURE_HPP
#define KVFERRY_KIT_FAILURE_HPP

#include <exception>
#include <new>
#include <string>
#include <system_error>

#include <kvferry/completion.hpp>
#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// An error code and the sentence that goes with it; no error by default.
struct Failure {
  std::error_code code;
  std::string sentence;

  explicit operator bool() const noexcept { return static_cast<bool>(code); }
};

/// Describes the exception that is being handled. To be called in a catch clause.
[[nodiscard]] inline Failure failure_being_handled() {
  try {
    throw;
  } catch (const std::system_error& error) {
    return {error.code(), error.what()};
  } catch (const std::bad_alloc& error) {
    return {std::make_error_code(std::errc::not_enough_memory), error.what()};
  } catch (const std::exception& error) {
    return {errc::handshake_failed, error.what()};
  } catch (...) {
    return {errc::handshake_failed, "something was thrown that is no std::exception"};
  }
}

/// Whether a connection that ended so may have been closed by the other side.
[[nodiscard]] inline bool is_cut_off(const std::error_code& cause) noexcept {
  return cause == errc::peer_closed || cause == errc::connection_lost || cause == std::errc::connection_reset ||
         cause == std::errc::broken_pipe;
}

/// Runs work that may be left undone if there is no memory for it.
template <class Work>
void if_memory_lasts(Work work) noexcept {
  try {
    work();
  } catch (...) {
    detail::log_exception("where something was left undone");
  }
}

/// Empty if there is no memory for it.
[[nodiscard]] inline std::string copied_if_memory_lasts(const std::string& sentence) noexcept {
  std::string copy;
  if_memory_lasts([&] { copy = sentence; });
  return copy;
}

/// The code of kvferry's own as which a refusal travels: a peer doesn't know the numbers of other categories.
[[nodiscard]] inline errc code_for_peer(const std::error_code& cause) {
  if (cause.category() == error_category()) {
    return static_cast<errc>(cause.value());
  }
  if (cause == condition::peer_failed) {
    return errc::connection_lost;
  }
  return cause == condition::retryable ? errc::resource_limit : errc::handshake_failed;
}

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_FAILURE_HPP
