// SPDX-License-Identifier: Apache-2.0
// The definitions of the transport within one host.
#pragma once

#include <kvferry/shared_region-inl.hpp>
#include <kvferry/shm/byte_rings-inl.hpp>
#include <kvferry/shm/copy-inl.hpp>
#include <kvferry/shm/mapped_file-inl.hpp>
#include <kvferry/shm/meeting-inl.hpp>
#include <kvferry/shm/process_memory-inl.hpp>
#include <kvferry/shm/region_exchange-inl.hpp>
#include <kvferry/shm/shared_areas-inl.hpp>
#include <kvferry/shm/unix_socket-inl.hpp>
#include <kvferry/shm_transfer_channel-inl.hpp>
