// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/version.hpp>

/// Marks what a shared library of kvferry's offers: all else is hidden in it, and clashes with nothing of the program's.
#define KVFERRY_EXPORT __attribute__((visibility("default")))

// Asio's objects differ with and without run-time type information, and what includes kvferry shares them with it.
#if defined(__cpp_rtti) && !KVFERRY_RTTI
#error "this kvferry was built without RTTI: build what includes it with -fno-rtti, or kvferry with -DKVFERRY_RTTI=ON"
#elif !defined(__cpp_rtti) && KVFERRY_RTTI
#error "this kvferry was built with RTTI: build what includes it with -frtti, or kvferry with -DKVFERRY_RTTI=OFF"
#endif
