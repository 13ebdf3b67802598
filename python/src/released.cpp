// SPDX-License-Identifier: Apache-2.0
#include "released.hpp"

#include <kvferry/detail/event_descriptor.hpp>
#include <kvferry/detail/process.hpp>

#include <unistd.h>

namespace kvferry::python {
namespace {

/// A forked child doesn't wake its parent's threads.
constinit PerProcess<EventDescriptor> exit_event;

}  // namespace

int InterpreterExit::descriptor() { return exit_event.here().descriptor(); }

void InterpreterExit::begin() {
  exiting_thread = std::this_thread::get_id();
  begun = true;
  exit_event.here().set();
}

void InterpreterExit::wait_for_threads() {
  while (const int left = between) {
    const nanobind::gil_scoped_release released;
    between.wait(left);
  }
}

void InterpreterExit::sleep_for_ever() {
  (void)PyEval_SaveThread();
  for (;;) {
    ::pause();
  }
}

}  // namespace kvferry::python
