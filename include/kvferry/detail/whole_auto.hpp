// SPDX-License-Identifier: Apache-2.0
// Without an include guard: see whole_tcp.hpp.
#include <kvferry/detail/whole_shm.hpp>

#if KVFERRY_HEADER_ONLY && !defined(KVFERRY_WHOLE_AUTO)
#define KVFERRY_WHOLE_AUTO
#include <kvferry/detail/macros_off.hpp>
#include <kvferry/auto-inl.hpp>
#include <kvferry/detail/macros_on.hpp>
#endif
