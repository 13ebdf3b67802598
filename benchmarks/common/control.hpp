// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <asio/generic/stream_protocol.hpp>
#include <asio/io_context.hpp>

#include <cstdint>
#include <memory>
#include <string>

#include "job.hpp"

namespace bench {

/// Where the two processes agree on what to do: a connection beside the one that is measured, with a line of JSON for each
/// message. Blocks; for one thread at a time.
class Control {
 public:
  using Socket = asio::generic::stream_protocol::socket;

  /// Takes a connected socket.
  explicit Control(int socket);
  /// Waits for an initiator at `host:port` of this machine.
  [[nodiscard]] static Control accept(const std::string& address);
  /// Connects to a target that waits there.
  [[nodiscard]] static Control connect(const std::string& address);

  void send(const Json& message);
  /// @throws std::runtime_error what the other side failed with, or that it is gone.
  [[nodiscard]] Json receive();
  /// Sends, and waits for the answer.
  Json ask(const Json& message);
  /// Whether the other side said all that it had to say; waits until it speaks or goes.
  [[nodiscard]] bool ended();

 private:
  explicit Control(std::unique_ptr<asio::io_context> context, Socket socket);

  std::unique_ptr<asio::io_context> context_;
  Socket socket_;
  std::string received_;
};

/// The other half on this machine: this program once more, with a control connection to this process as its stdin. Ends with
/// this object, asked for by a closed connection first.
class TargetProcess {
 public:
  TargetProcess();
  TargetProcess(const TargetProcess&) = delete;
  TargetProcess& operator=(const TargetProcess&) = delete;
  ~TargetProcess();

  [[nodiscard]] Control& control() { return *control_; }
  /// Closes the connection and waits for the end. @throws std::runtime_error if that was no good one.
  void finish();

 private:
  pid_t pid_ = -1;
  std::unique_ptr<Control> control_;
};

/// The option that makes a process the target of a TargetProcess.
inline constexpr const char* target_option = "--target-on-stdin";

}  // namespace bench
