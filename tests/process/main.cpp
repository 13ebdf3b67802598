// SPDX-License-Identifier: Apache-2.0
#include <kvferry/testing/run_main.hpp>

#include <unistd.h>

#include "program.hpp"

namespace {

const pid_t started_as = ::getpid();

}  // namespace

/// What a forked child inherits of its parent's channels stays where it is, on purpose: LeakSanitizer, which asks this, would
/// take it for leaks.
extern "C" int __lsan_is_turned_off() { return ::getpid() != started_as ? 1 : 0; }

int main(int argc, char** argv) {
  int exit_code = 0;
  if (kvferry::testing::Program::asked_for(argc, argv, exit_code)) {
    return exit_code;
  }
  return kvferry::testing::run_main(argc, argv, {.may_lack_capabilities = false});
}
