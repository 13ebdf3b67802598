// SPDX-License-Identifier: Apache-2.0
// Without an include guard: each public header includes this before its own. Header-only, the first of them brings in all
// definitions here, where nothing is declared yet. They include what they need in the right order, whatever that first
// header is.
#include <kvferry/config.hpp>

#if KVFERRY_HEADER_ONLY && !defined(KVFERRY_WHOLE_TCP)
#define KVFERRY_WHOLE_TCP
#pragma GCC system_header  // the warnings that the program turns on are not for the definitions
// In this order:
// clang-format off
#include <kvferry/detail/definitions_begin.hpp>
#include <kvferry/tcp-inl.hpp>
#include <kvferry/detail/definitions_end.hpp>
// clang-format on
#endif
