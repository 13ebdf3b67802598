// SPDX-License-Identifier: Apache-2.0
#include <kvferry/testing/run_main.hpp>

#include "program.hpp"

int main(int argc, char** argv) {
  int exit_code = 0;
  if (kvferry::testing::Program::asked_for(argc, argv, exit_code)) {
    return exit_code;
  }
  return kvferry::testing::run_main(argc, argv, {.may_lack_capabilities = false});
}
