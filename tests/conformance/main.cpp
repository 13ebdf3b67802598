// SPDX-License-Identifier: Apache-2.0
#include <kvferry/testing/run_main.hpp>

int main(int argc, char** argv) { return kvferry::testing::run_main(argc, argv); }
