// SPDX-License-Identifier: Apache-2.0
#include "conformance/auto_traits.hpp"

#include <kvferry/testing/conformance_transports.hpp>

#ifdef KVFERRY_TESTING_SANITIZED
// Each connection of this one tries both roads; the other one's code is in the suite on shm as well.
KVFERRY_INSTANTIATE_CONFORMANCE_SUITE(Auto, AutoOverTcp);
#else
KVFERRY_INSTANTIATE_CONFORMANCE_SUITE(Auto, AutoOverShm, AutoOverTcp);
#endif
