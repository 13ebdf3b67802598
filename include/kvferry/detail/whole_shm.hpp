// SPDX-License-Identifier: Apache-2.0
// Without an include guard: see whole_tcp.hpp.
#include <kvferry/detail/whole_tcp.hpp>

#if KVFERRY_HEADER_ONLY && !defined(KVFERRY_WHOLE_SHM)
#define KVFERRY_WHOLE_SHM
#include <kvferry/detail/macros_off.hpp>
#include <kvferry/shm-inl.hpp>
#include <kvferry/detail/macros_on.hpp>
#endif
