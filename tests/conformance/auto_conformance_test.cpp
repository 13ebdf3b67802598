// SPDX-License-Identifier: Apache-2.0
#include "conformance/auto_traits.hpp"

#include <kvferry/testing/conformance_transports.hpp>

#ifndef KVFERRY_TESTING_SANITIZED
// The kit and the links are what the sanitizers see on shm and TCP, too; the choice itself they see in tests/auto.
KVFERRY_INSTANTIATE_CONFORMANCE_SUITE(Auto, AutoOverShm, AutoOverTcp);
#endif
