// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// A static object that is there before every other of the program, and after all of them: as `constinit`, of a type
/// that can be made at compile time. Its destructor is never called.
template <class T>
union NeverDestroyed {
  constexpr NeverDestroyed() noexcept : value() {}
  NeverDestroyed(const NeverDestroyed&) = delete;
  NeverDestroyed& operator=(const NeverDestroyed&) = delete;
  constexpr ~NeverDestroyed() {}

  T value;
};

}  // namespace kvferry
