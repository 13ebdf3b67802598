// SPDX-License-Identifier: Apache-2.0
// The least that takes something of the library's.
#include <kvferry/error.hpp>

int main() { return kvferry::make_error_code(kvferry::errc::closed).value(); }
