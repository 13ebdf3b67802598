// SPDX-License-Identifier: Apache-2.0
// Without an include guard: each public header includes this before its own. Header-only, the first of them brings in all
// definitions here, where nothing is declared yet. They include what they need in the right order, whatever that first
// header is.
#include <kvferry/config.hpp>

#if KVFERRY_HEADER_ONLY && !defined(KVFERRY_WHOLE_TCP)
#define KVFERRY_WHOLE_TCP
#include <kvferry/detail/macros_off.hpp>
#include <kvferry/tcp-inl.hpp>
#include <kvferry/detail/macros_on.hpp>
#endif
