// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_core.hpp>
#ifndef KVFERRY_RDMA_ERROR_HPP
#define KVFERRY_RDMA_ERROR_HPP

#include <system_error>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// The status of a work completion, with libibverbs' numbers. If a verb fails (registering memory, creating or changing
/// a queue pair), its error is an errno value instead.
enum class wc_status {
  success = 0,
  local_length_error = 1,
  local_qp_operation_error = 2,  ///< The adapter could not carry it out: Soft-RoCE says so when its link is down.
  local_eec_operation_error = 3,
  local_protection_error = 4,
  flushed = 5,  ///< The queue pair was in its error state already.
  memory_window_bind_error = 6,
  bad_response = 7,
  local_access_error = 8,
  remote_invalid_request = 9,
  remote_access_error = 10,  ///< The peer's adapter refused the key, the address or the length; the peer may be
                             ///< shutting down.
  remote_operation_error = 11,
  retry_exceeded = 12,      ///< The peer, its host or the way there did not answer.
  rnr_retry_exceeded = 13,  ///< The peer had no receive buffer for too long.
  local_rdd_violation = 14,
  remote_invalid_rd_request = 15,
  remote_aborted = 16,
  invalid_eec_number = 17,
  invalid_eec_state = 18,
  fatal = 19,
  response_timeout = 20,
  general = 21,
};

/// The category of `wc_status`; its name is "kvferry.rdma". The errors of local memory (`local_protection_error`,
/// `local_access_error`, `memory_window_bind_error`) belong to `condition::invalid_argument`, all others to
/// `condition::peer_failed`. They belong to `condition::retryable` too, except the ones that show a broken agreement:
/// `local_length_error`, `bad_response`, `remote_invalid_request`, `remote_invalid_rd_request`, `remote_access_error`.
[[nodiscard]] KVFERRY_EXPORT const std::error_category& rdma_category() noexcept;

[[nodiscard]] KVFERRY_EXPORT std::error_code make_error_code(wc_status status) noexcept;

}  // namespace kvferry

/// @cond
template <>
struct std::is_error_code_enum<kvferry::wc_status> : std::true_type {};
/// @endcond

#endif  // KVFERRY_RDMA_ERROR_HPP
