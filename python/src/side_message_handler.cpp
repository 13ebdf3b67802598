// SPDX-License-Identifier: Apache-2.0
#include "side_message_handler.hpp"

#include <kvferry/error.hpp>
#include <kvferry/side_message_codec.hpp>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <string>
#include <utility>

#include "arguments.hpp"
#include "released.hpp"

namespace kvferry::python {

SideMessage SideMessageHandler::answer(const SideMessage& message) const {
  if (InterpreterExit::has_begun()) {
    throw TransferError(errc::closed, "the interpreter of the channel's program is exiting");
  }
  const nb::gil_scoped_acquire acquired;
  InterpreterExit::is_waited_for = true;
  struct Leaving {
    ~Leaving() { InterpreterExit::is_waited_for = false; }
  } const leaving;
  try {
    const nb::object answer = function_(message.type(), to_bytes(message.encoded()));
    if (nb::isinstance<nb::bytes>(answer)) {
      return parse_side_message(bytes_of(nb::cast<nb::bytes>(answer)));
    }
    const auto [code, sentence] = nb::cast<std::pair<int, std::string>>(answer);
    throw TransferError(static_cast<errc>(code), sentence);
  } catch (nb::python_error& raised) {
    // Nor is the peer told where in this program it happened.
    const auto name = nb::cast<std::string>(raised.type().attr("__name__"));
    raised.discard_as_unraisable("handle_init_side_msg");
    throw TransferError(errc::handshake_failed, name);
  }
}

}  // namespace kvferry::python
