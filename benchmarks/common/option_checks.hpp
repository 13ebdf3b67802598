// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>

namespace bench {

/// Takes 64K and 1M.
inline CLI::Validator size_with_unit() { return CLI::AsSizeValue(false).description(""); }

template <class T>
CLI::Validator between(T smallest, T largest) {
  return CLI::Range(smallest, largest).description("");
}

}  // namespace bench
