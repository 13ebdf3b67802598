// SPDX-License-Identifier: Apache-2.0
// Uses the library that is linked, and a file that has compiled kvferry itself. Each has its own error category.
#include <kvferry/error.hpp>

#include <cstdio>
#include <string>
#include <system_error>

std::error_code header_only_error();

int main() {
  const std::error_code linked = make_error_code(kvferry::errc::closed);
  const std::error_code compiled = header_only_error();
  std::printf("%s, %s\n", linked.message().c_str(), compiled.message().c_str());
  return linked.message() == compiled.message() && linked.category() != compiled.category() ? 0 : 1;
}
