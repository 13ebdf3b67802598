// SPDX-License-Identifier: Apache-2.0
#pragma once

// The faults of a broken channel, and which one a program is to have.
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// The fault of a deliberately broken channel.
enum class Fault {
  none,                ///< Nothing: for control.
  double_completion,   ///< Calls a completion twice.
  lost_completion,     ///< Drops every third completion.
  stuck_completion,    ///< Keeps every third completion, and never calls it.
  inline_handler,      ///< Runs handlers inside the call that started the operation.
  early_release,       ///< Ends a write before its bytes have moved.
  early_notification,  ///< Hands a notification out before the bytes have moved.
  wrong_byte,          ///< Changes one byte of each batch.
  wrong_count,         ///< Counts one object too few.
  whole_pages,         ///< Writes whole pages where objects are smaller.
  no_statuses,         ///< Does not report on the objects of a batch.
  deaf_to_cancel,      ///< Ignores the cancellation slot.
  endless,             ///< Ignores the deadline.
  deaf_to_close,       ///< Goes on after `close`.
  hanging_close,       ///< Never returns from `close`.
  late_write,          ///< A write that was given up is done all the same, with a later operation.
  hollow_fence,        ///< A fence waits for nothing.
  first_object_wins,   ///< Takes a batch's objects in the wrong order.
  late_notification,   ///< A write that was given up notifies its peer with a later operation.
  unsaid_doubt,        ///< A write that was given up lands later, and its error doesn't say that it may.
  late_read,           ///< A read that was given up reaches for its buffers after its end.
  lost_answer,         ///< What a peer answered before it closed is not taken.
  fills_gaps,          ///< A read writes to a byte between the blocks of a strided object.
  keyless,             ///< Sends notifications without their keys.
  deaf_to_peers,       ///< Tells of no peer that is gone.
  silent_disconnect,   ///< A disconnect does nothing.
  any_incarnation,     ///< Metadata leads to whoever answers.
  hasty_removal,       ///< The removal of a region ends while the region is in use.
  incapable,           ///< Offers nothing, so that every test of what it can do is skipped.
};

[[nodiscard]] inline const std::map<std::string_view, Fault>& faults() {
  static const std::map<std::string_view, Fault> all{
      {"none", Fault::none},
      {"double_completion", Fault::double_completion},
      {"lost_completion", Fault::lost_completion},
      {"stuck_completion", Fault::stuck_completion},
      {"inline_handler", Fault::inline_handler},
      {"early_release", Fault::early_release},
      {"early_notification", Fault::early_notification},
      {"wrong_byte", Fault::wrong_byte},
      {"wrong_count", Fault::wrong_count},
      {"whole_pages", Fault::whole_pages},
      {"no_statuses", Fault::no_statuses},
      {"deaf_to_cancel", Fault::deaf_to_cancel},
      {"endless", Fault::endless},
      {"deaf_to_close", Fault::deaf_to_close},
      {"hanging_close", Fault::hanging_close},
      {"late_write", Fault::late_write},
      {"hollow_fence", Fault::hollow_fence},
      {"first_object_wins", Fault::first_object_wins},
      {"late_notification", Fault::late_notification},
      {"unsaid_doubt", Fault::unsaid_doubt},
      {"late_read", Fault::late_read},
      {"lost_answer", Fault::lost_answer},
      {"fills_gaps", Fault::fills_gaps},
      {"keyless", Fault::keyless},
      {"deaf_to_peers", Fault::deaf_to_peers},
      {"silent_disconnect", Fault::silent_disconnect},
      {"any_incarnation", Fault::any_incarnation},
      {"hasty_removal", Fault::hasty_removal},
      {"incapable", Fault::incapable},
  };
  return all;
}

/// Where the test that starts this program says which fault it wants.
inline constexpr const char* fault_variable = "KVFERRY_TESTING_FAULT";

[[nodiscard]] inline Fault requested_fault() {
  const char* const name = std::getenv(fault_variable);
  const auto found = faults().find(name == nullptr ? std::string_view() : std::string_view(name));
  if (found == faults().end()) {
    throw std::invalid_argument(std::string("set ") + fault_variable + " to one of the faults in faults.hpp");
  }
  return found->second;
}

}  // namespace kvferry::testing
