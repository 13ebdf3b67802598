// SPDX-License-Identifier: Apache-2.0
// The definitions of the kit.
#pragma once

#include <kvferry/kit/blocking_transfer-inl.hpp>
#include <kvferry/kit/checks-inl.hpp>
#include <kvferry/kit/init_exchange-inl.hpp>
#include <kvferry/kit/io_threads-inl.hpp>
#include <kvferry/kit/notification_queue-inl.hpp>
#include <kvferry/kit/operation-inl.hpp>
#include <kvferry/kit/operation_registry-inl.hpp>
#include <kvferry/kit/overlap-inl.hpp>
#include <kvferry/kit/peer_acceptance-inl.hpp>
#include <kvferry/kit/peer_attempt_end-inl.hpp>
#include <kvferry/kit/peer_attempts-inl.hpp>
#include <kvferry/kit/peer_directory-inl.hpp>
#include <kvferry/kit/peer_disconnect-inl.hpp>
#include <kvferry/kit/peer_facts-inl.hpp>
#include <kvferry/kit/peer_fences-inl.hpp>
#include <kvferry/kit/peer_greeting-inl.hpp>
#include <kvferry/kit/peer_metadata-inl.hpp>
#include <kvferry/kit/peer_regions-inl.hpp>
#include <kvferry/kit/peer_routes-inl.hpp>
#include <kvferry/kit/peer_takeover-inl.hpp>
#include <kvferry/kit/poller-inl.hpp>
#include <kvferry/kit/refusals-inl.hpp>
#include <kvferry/kit/region_removals-inl.hpp>
#include <kvferry/kit/side_message_queue-inl.hpp>
#include <kvferry/kit/stranger_links-inl.hpp>
#include <kvferry/kit/striped_operation-inl.hpp>
#include <kvferry/kit/transfer_channel_kit-inl.hpp>
#include <kvferry/kit/transfer_channel_kit_calls-inl.hpp>
#include <kvferry/kit/transfer_counters-inl.hpp>
