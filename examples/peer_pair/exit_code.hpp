// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace example {

/// The exit status of a peer's process.
enum class ExitCode : int {
  ok = 0,
  unexpected = 1,
  bad_options = 2,
  cannot_listen = 3,
  no_agreement = 4,
  transfer_failed = 5,
  checksum_mismatch = 6,
  no_file_or_memory = 7,
  interrupted = 130,
};

/// The part of --help that explains them.
inline constexpr std::string_view exit_code_help =
    "Exit codes:\n"
    "  0    the cache arrived and its checksum matches\n"
    "  1    something unexpected\n"
    "  2    bad options\n"
    "  3    cannot listen, for instance because the port is taken\n"
    "  4    the peer cannot be reached, never came, or refused the cache\n"
    "  5    the transfer failed: the peer died, closed, or let a time-out pass\n"
    "  6    the checksums differ\n"
    "  7    a file cannot be read or written, or there is not enough memory\n"
    "  130  interrupted by SIGINT (Ctrl-C) or SIGTERM\n";

/// Why a peer ends without success: one line for people, and the exit code.
class Failure : public std::runtime_error {
 public:
  Failure(ExitCode code, const std::string& line) : std::runtime_error(line), code_(code) {}

  [[nodiscard]] ExitCode code() const noexcept { return code_; }

 private:
  ExitCode code_;
};

/// The body of a main function: turns whatever leaves `body` into one line on stderr and an exit code.
int run_program(std::string_view name, const std::function<void()>& body);

}  // namespace example
