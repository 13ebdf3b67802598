// SPDX-License-Identifier: Apache-2.0
// The definitions of the channel that chooses among transports.
#pragma once

#include <kvferry/auto/own_roads-inl.hpp>
#include <kvferry/auto/road_acceptance-inl.hpp>
#include <kvferry/auto/road_dial-inl.hpp>
#include <kvferry/auto_transfer_channel-inl.hpp>
