// SPDX-License-Identifier: Apache-2.0
// All definitions but those of the transports.
#pragma once

#include <kvferry/handshake-inl.hpp>
#include <kvferry/interface-inl.hpp>
#include <kvferry/kit-inl.hpp>
