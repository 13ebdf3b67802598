// SPDX-License-Identifier: Apache-2.0
// The definitions of the transport within one host.
#pragma once

#include <kvferry/shm/meeting-inl.hpp>
#include <kvferry/shm/process_memory-inl.hpp>
#include <kvferry/shm/unix_socket-inl.hpp>
#include <kvferry/shm_transfer_channel-inl.hpp>
