// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::testing {

/// Small programs that change what all of a process shares - limits, signals, how it ends - each run in a process of its
/// own: this test program, started anew.
class Program {
 public:
  /// Registers `body`, whose result is the exit code.
  Program(const char* name, int (*body)());

  /// Of a run that is over.
  struct Ended {
    int exit_code = -1;  ///< -1 if it didn't exit.
    int signal = 0;
    bool hung = false;   ///< It was still running after half of a test's limit, and was killed.
    std::string output;  ///< stdout and stderr.

    [[nodiscard]] bool right() const noexcept { return exit_code == 0; }
    [[nodiscard]] std::string to_string() const;
  };

  /// @param argument what the program finds as `argument()`.
  [[nodiscard]] static Ended run(const std::string& name, const std::string& argument = {});
  [[nodiscard]] static const std::string& argument();

  /// Waits for a child of this process; kills it after half of a test's limit.
  [[nodiscard]] static Ended wait_for(int pid);

  /// For `main`: whether the arguments ask for a program; its exit code is in `exit_code` then.
  [[nodiscard]] static bool asked_for(int argc, char** argv, int& exit_code);
};

/// `KVFERRY_PROGRAM(name) { ... return 0; }`
#define KVFERRY_PROGRAM(name)                                                         \
  static int program_##name();                                                        \
  static const ::kvferry::testing::Program registered_##name(#name, &program_##name); \
  static int program_##name()

}  // namespace kvferry::testing
