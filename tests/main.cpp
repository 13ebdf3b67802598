// SPDX-License-Identifier: Apache-2.0
// The main function of all test programs.
#include <kvferry/testing/run_main.hpp>

int main(int argc, char** argv) {
  // kvferry's own transports can do everything: what is skipped as a whole was not tested.
  return kvferry::testing::run_main(argc, argv, {.may_lack_capabilities = false});
}
