// SPDX-License-Identifier: Apache-2.0
// Without an include guard: see whole_tcp.hpp.
#include <kvferry/detail/whole_shm.hpp>

#if KVFERRY_HEADER_ONLY && !defined(KVFERRY_WHOLE_AUTO)
#define KVFERRY_WHOLE_AUTO
#pragma GCC system_header  // the warnings that the program turns on are not for the definitions
// In this order:
// clang-format off
#include <kvferry/detail/definitions_begin.hpp>
#include <kvferry/auto-inl.hpp>
#include <kvferry/detail/definitions_end.hpp>
// clang-format on
#endif
