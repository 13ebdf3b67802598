// SPDX-License-Identifier: Apache-2.0
// The definitions of the interface, and of what all else stands on.
#pragma once

#include <kvferry/base_transfer_channel-inl.hpp>
#include <kvferry/channel_stats-inl.hpp>
#include <kvferry/completion-inl.hpp>
#include <kvferry/completion_queue-inl.hpp>
#include <kvferry/detail/error_name-inl.hpp>
#include <kvferry/detail/event_descriptor-inl.hpp>
#include <kvferry/detail/host_address-inl.hpp>
#include <kvferry/detail/listening_socket-inl.hpp>
#include <kvferry/detail/name_lookups-inl.hpp>
#include <kvferry/detail/name_resolution-inl.hpp>
#include <kvferry/detail/process-inl.hpp>
#include <kvferry/detail/prometheus-inl.hpp>
#include <kvferry/detail/secret-inl.hpp>
#include <kvferry/detail/source_address-inl.hpp>
#include <kvferry/detail/standard_descriptors-inl.hpp>
#include <kvferry/detail/text-inl.hpp>
#include <kvferry/detail/xxh3-inl.hpp>
#include <kvferry/error-inl.hpp>
#include <kvferry/keyring-inl.hpp>
#include <kvferry/log-inl.hpp>
#include <kvferry/side_message_codec-inl.hpp>
#include <kvferry/url-inl.hpp>
