// SPDX-License-Identifier: Apache-2.0
#include <kvferry/rdma_error.hpp>

#include <infiniband/verbs.h>

#include <string>

#include <kvferry/error.hpp>

#include <kvferry/detail/never_destroyed.hpp>

namespace kvferry::inline KVFERRY_ABI {
namespace {

static_assert(static_cast<int>(wc_status::local_protection_error) == IBV_WC_LOC_PROT_ERR);
static_assert(static_cast<int>(wc_status::flushed) == IBV_WC_WR_FLUSH_ERR);
static_assert(static_cast<int>(wc_status::remote_access_error) == IBV_WC_REM_ACCESS_ERR);
static_assert(static_cast<int>(wc_status::retry_exceeded) == IBV_WC_RETRY_EXC_ERR);
static_assert(static_cast<int>(wc_status::rnr_retry_exceeded) == IBV_WC_RNR_RETRY_EXC_ERR);
static_assert(static_cast<int>(wc_status::remote_aborted) == IBV_WC_REM_ABORT_ERR);
static_assert(static_cast<int>(wc_status::response_timeout) == IBV_WC_RESP_TIMEOUT_ERR);
static_assert(static_cast<int>(wc_status::general) == IBV_WC_GENERAL_ERR);

/// Statuses that say that the caller's memory is not what it was said to be.
bool is_local_memory(wc_status status) noexcept {
  return status == wc_status::local_protection_error || status == wc_status::local_access_error ||
         status == wc_status::memory_window_bind_error;
}

/// Statuses that say that peer and adapter no longer do what was agreed; a connection made anew may meet the same.
bool is_breach(wc_status status) noexcept {
  switch (status) {
    case wc_status::local_length_error:
    case wc_status::bad_response:
    case wc_status::remote_invalid_request:
    case wc_status::remote_invalid_rd_request:
    // Requests stay within what the peer offered. An adapter that refuses one all the same no longer has the memory
    // registered: the peer is going down, and its kernel takes its memory back before its connections.
    case wc_status::remote_access_error: return true;
    default: return false;
  }
}

/// Statuses that are the peer's adapter's own answer: it has taken nothing more on that queue pair since.
bool is_refusal(wc_status status) noexcept {
  return status == wc_status::remote_access_error || status == wc_status::remote_invalid_request ||
         status == wc_status::remote_operation_error;
}

class RdmaCategory final : public std::error_category {
 public:
  [[nodiscard]] const char* name() const noexcept override { return "kvferry.rdma"; }

  [[nodiscard]] std::string message(int value) const override {
    return ibv_wc_status_str(static_cast<ibv_wc_status>(value));
  }

  [[nodiscard]] bool equivalent(int value, const std::error_condition& wanted) const noexcept override {
    const auto status = static_cast<wc_status>(value);
    const bool error = status != wc_status::success;
    if (wanted == condition::invalid_argument) {
      return is_local_memory(status);
    }
    if (wanted == condition::peer_failed) {
      return error && !is_local_memory(status);
    }
    if (wanted == condition::retryable) {
      return error && !is_local_memory(status) && !is_breach(status);
    }
    if (wanted == condition::may_still_land) {
      return error && !is_refusal(status);
    }
    return std::error_category::equivalent(value, wanted);
  }
};

constinit const NeverDestroyed<RdmaCategory> the_rdma_category;

}  // namespace

const std::error_category& rdma_category() noexcept { return the_rdma_category.value; }

std::error_code make_error_code(wc_status status) noexcept { return {static_cast<int>(status), rdma_category()}; }

}  // namespace kvferry
