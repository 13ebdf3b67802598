// SPDX-License-Identifier: Apache-2.0
#include "operation.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <exception>
#include <span>
#include <utility>

#include "arguments.hpp"
#include "errors.hpp"
#include "released.hpp"
#include "results.hpp"

namespace kvferry::python {
namespace {

using Clock = std::chrono::steady_clock;

Operation& operation_of(const nb::object& object) { return *nb::inst_ptr<Operation>(object); }

/// Operations of queues that are gone. Never destroyed, as the interpreter is gone before a static object is.
std::vector<nb::object>& left_behind() {
  static auto* const operations = new std::vector<nb::object>;
  return *operations;
}

/// While it lasts a signal of this thread waits, so that one that comes between the look and the sleep isn't slept through.
class SignalsWait {
 public:
  SignalsWait() noexcept {
    sigset_t waiting;
    sigfillset(&waiting);
    for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS}) {
      sigdelset(&waiting, own);
    }
    pthread_sigmask(SIG_BLOCK, &waiting, &before_);
  }
  SignalsWait(const SignalsWait&) = delete;
  SignalsWait& operator=(const SignalsWait&) = delete;
  ~SignalsWait() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

  [[nodiscard]] const sigset_t& before() const noexcept { return before_; }

 private:
  sigset_t before_;
};

void run_signal_handlers() {
  if (PyErr_CheckSignals() != 0) {
    throw nb::python_error();
  }
}

enum class Woken { by_descriptor, by_time, by_exit };

/// How long the thread that runs signals' handlers sleeps at most: a signal may go to a thread of somebody else's that
/// doesn't block it, and wakes nobody here.
constexpr std::chrono::seconds longest_sleep_of_main_thread{1};

/// Sleeps without the GIL until `descriptor` can be read, it is `until`, or the interpreter exits; wakes for signals and has
/// Python handle them.
Woken sleep_for(int descriptor, std::optional<Clock::time_point> until) {
  std::array<pollfd, 2> waited{{{descriptor, POLLIN, 0}, {InterpreterExit::descriptor(), POLLIN, 0}}};
  for (;;) {
    run_signal_handlers();
    const SignalsWait waiting;
    run_signal_handlers();
    auto wake = until;
    if (::gettid() == ::getpid()) {
      const auto look = Clock::now() + longest_sleep_of_main_thread;
      wake = std::min(wake.value_or(look), look);
    }
    timespec left{};
    if (wake) {
      const auto rest = std::max(*wake - Clock::now(), Clock::duration::zero());
      const auto seconds = std::chrono::floor<std::chrono::seconds>(rest);
      left = {seconds.count(), std::chrono::nanoseconds(rest - seconds).count()};
    }
    int ready = 0;
    {
      const Released released;
      ready = ::ppoll(waited.data(), waited.size(), wake ? &left : nullptr, &waiting.before());
      if (ready < 0 && errno != EINTR) {
        throw std::system_error(errno, std::system_category(), "ppoll");
      }
    }
    if (ready > 0) {
      return waited[0].revents != 0 ? Woken::by_descriptor : Woken::by_exit;
    }
    if (ready == 0 && until && wake == until) {
      return Woken::by_time;
    }
  }
}

/// Sleeps until `descriptor` can be read, whatever comes: the operation is being ended.
void sleep_through(int descriptor) {
  const Released released;
  pollfd waited{descriptor, POLLIN, 0};
  while (::poll(&waited, 1, -1) < 0 && errno == EINTR) {
  }
}

nb::object error_of(const Operation& operation) {
  if (!operation.end || !operation.end->error) {
    return nb::none();
  }
  const std::string text =
      operation.diagnostic.empty() ? operation.name + ": " + operation.end->error.message() : operation.diagnostic;
  return make_error(operation.end->error, text, operation.end->count, operation.statuses);
}

nb::object result_of(Operation& operation) {
  if (!operation.look()) {
    throw std::runtime_error(operation.name + " has not ended yet");
  }
  // As for the throwing form in C++: fewer notifications than were waited for are what the timeout leaves.
  const bool partial =
      operation.end->error == errc::timed_out && std::holds_alternative<std::vector<Notification>>(operation.result);
  if (operation.end->error && !partial) {
    raise(error_of(operation));
  }
  return std::holds_alternative<std::monostate>(operation.result) ? nb::cast(operation.end->count)
                                                                  : to_python(operation.result);
}

}  // namespace

void sweep() {
  auto& operations = left_behind();
  if (!operations.empty()) {
    // What is let go may run Python code, which may come back here: not while the vector is being changed.
    std::vector<nb::object> ended;
    const auto first = std::partition(operations.begin(), operations.end(),
                                      [](const nb::object& object) { return !operation_of(object).handle.ended(); });
    ended.assign(std::make_move_iterator(first), std::make_move_iterator(operations.end()));
    operations.erase(first, operations.end());
    for (const nb::object& object : ended) {
      operation_of(object).look();  // the program may have it still, and not look
    }
  }
}

bool Operation::look() {
  if (!end) {
    end = handle.result();
    if (end) {
      // Python code that runs meanwhile finds it ended.
      const std::vector<nb::object> dropped = std::exchange(kept, {});
      const std::shared_ptr<const void> dropped_region = std::exchange(kept_region, nullptr);
      queue.reset();
    }
  }
  return end.has_value();
}

nb::object to_object(std::shared_ptr<Operation> operation) { return nb::cast(std::move(operation)); }

Queue::~Queue() {
  sweep();
  let_go();
}

void Queue::let_go() {
  // Python code that runs meanwhile finds none.
  for (auto& [number, object] : std::exchange(pending_, {})) {
    if (!operation_of(object).look()) {
      left_behind().push_back(object);
    }
  }
}

int Queue::traverse(visitproc visit, void* arg) const {
  for (const auto& [number, object] : pending_) {
    Py_VISIT(object.ptr());
  }
  return 0;
}

void Queue::check_process() const {
  if (origin_.was_forked()) {
    throw TransferError(errc::forked,
                        "the completion queue was made before this process was forked; make another one here");
  }
}

std::uint64_t Queue::add(std::shared_ptr<Operation> operation) {
  check_process();
  nb::object object = to_object(std::move(operation));
  pending_.emplace(++last_, std::move(object));
  return last_;
}

std::vector<nb::object> Queue::drain(std::size_t most) {
  sweep();
  std::vector<nb::object> ended;
  std::array<CompletionEntry, 64> entries;
  while (ended.size() < most) {
    const std::size_t room = std::min(entries.size(), most - ended.size());
    const std::size_t count = queue_->drain(std::span(entries).first(room));
    for (const CompletionEntry& entry : std::span(entries).first(count)) {
      auto found = pending_.extract(entry.user_data);
      if (!found.empty()) {
        ended.push_back(std::move(found.mapped()));
      }
    }
    if (count < room) {
      break;
    }
  }
  for (const nb::object& object : ended) {
    operation_of(object).look();
  }
  return ended;
}

bool Queue::wait(std::optional<double> seconds) const {
  check_process();
  std::optional<Clock::time_point> until;
  if (seconds) {
    until = Clock::now() + std::max(duration_of<std::chrono::microseconds>(std::min(*seconds, 1e9)),
                                    std::chrono::microseconds::zero());
  }
  refuse_at_exit();
  const Woken woken = sleep_for(queue_->descriptor(), until);
  if (woken == Woken::by_exit) {
    refuse_at_exit();
  }
  return woken == Woken::by_descriptor;
}

void refuse_at_exit() {
  InterpreterExit::stop_here_if_begun();
  if (InterpreterExit::has_begun()) {
    throw TransferError(errc::closed, "the interpreter is exiting, and has closed all channels");
  }
}

void wait_for_end(CompletionQueue& queue, Operation& operation) {
  std::exception_ptr interruption;
  bool ending = false;
  CompletionEntry entry;
  while (queue.drain({&entry, 1}) == 0) {
    if (ending) {
      sleep_through(queue.descriptor());
      continue;
    }
    try {
      // The exit closes all channels, one after the other: perhaps first the one whose handler waits here for another.
      ending = sleep_for(queue.descriptor(), std::nullopt) == Woken::by_exit;
    } catch (...) {
      interruption = std::current_exception();
      ending = true;
    }
    if (ending) {
      operation.handle.cancel();
    }
  }
  operation.look();
  if (interruption) {
    std::rethrow_exception(interruption);
  }
  // One may have come while this thread waited for the GIL: raised here, the caller still knows what the operation has taken.
  run_signal_handlers();
}

namespace {

/// Adds what an operation has received, `things`, to the end of a list or deque: the first time.
void hand_over(Operation& operation, nb::handle to, const nb::list& things) {
  if (!std::exchange(operation.handed_over, true)) {
    to.attr("extend")(things);
  }
}

/// What is kept for the channel isn't shown to the collector: it stays until the operation has ended, whoever asks.
int traverse_operation(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (nb::inst_ready(self)) {
    Py_VISIT(nb::inst_ptr<Operation>(self)->user_data.ptr());
  }
  return 0;
}

int clear_operation(PyObject* self) {
  if (nb::inst_ready(self)) {
    const nb::object dropped = std::exchange(nb::inst_ptr<Operation>(self)->user_data, nb::none());
  }
  return 0;
}

int traverse_queue(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return nb::inst_ready(self) ? nb::inst_ptr<Queue>(self)->traverse(visit, arg) : 0;
}

int clear_queue(PyObject* self) {
  if (nb::inst_ready(self)) {
    nb::inst_ptr<Queue>(self)->let_go();
  }
  return 0;
}

PyType_Slot operation_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(&traverse_operation)},
                                 {Py_tp_clear, reinterpret_cast<void*>(&clear_operation)},
                                 {0, nullptr}};
PyType_Slot queue_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(&traverse_queue)},
                             {Py_tp_clear, reinterpret_cast<void*>(&clear_queue)},
                             {0, nullptr}};

}  // namespace

void bind_operation(nb::module_& module) {
  nb::class_<Operation>(
      module, "Operation", nb::type_slots(operation_slots),
      "An operation that was submitted. user_data is the program's.\n\n"
      "done() tells whether it has ended, cancel() asks for the end, which then comes as any end does. "
      "result() is what the blocking method returns or raises; before the end it raises RuntimeError.")
      .def_ro("name", &Operation::name)
      .def_rw("user_data", &Operation::user_data, nb::arg().none())
      .def("done", &Operation::look)
      .def("cancel", [](const Operation& self) { self.handle.cancel(); })
      .def("result", &result_of)
      .def("_hand_over", &hand_over, nb::arg("to"), nb::arg("things"))
      .def_prop_ro("error",
                   [](Operation& self) {
                     self.look();
                     return error_of(self);
                   })
      .def_prop_ro("transferred", [](Operation& self) { return self.look() ? self.end->count : std::size_t{0}; })
      .def_prop_ro("statuses", [](Operation& self) { return self.look() ? names_of(self.statuses) : nb::make_tuple(); })
      .def_prop_ro("sizes", [](Operation& self) { return self.look() ? self.sizes : std::vector<std::size_t>{}; });

  nb::class_<Queue>(
      module, "CompletionQueue", nb::is_weak_referenceable(), nb::type_slots(queue_slots),
      "Where submitted operations end.\n\n"
      "drain(most) takes out those that have ended, oldest first, and never blocks. wait(timeout) sleeps until "
      "there are some, and tells whether there are; timeout in seconds, None: for as long as it takes. "
      "fileno() can be polled for reading. len() counts the operations that have not been drained.")
      .def(nb::init<>())
      .def("fileno", [](Queue& self) { return self.native()->descriptor(); })
      .def("drain", &Queue::drain, nb::arg("most") = 1024)
      .def("wait", &Queue::wait, nb::arg("timeout").none() = nb::none())
      .def("__len__", &Queue::pending);
}

}  // namespace kvferry::python
