// SPDX-License-Identifier: Apache-2.0
// The definitions of the transport over TCP.
#pragma once

#include <kvferry/tcp/address_race-inl.hpp>
#include <kvferry/tcp/allowed_hosts-inl.hpp>
#include <kvferry/tcp/certificates-inl.hpp>
#include <kvferry/tcp/checksums-inl.hpp>
#include <kvferry/tcp/data_acceptor-inl.hpp>
#include <kvferry/tcp/data_acceptor_greetings-inl.hpp>
#include <kvferry/tcp/data_connection-inl.hpp>
#include <kvferry/tcp/data_dialer-inl.hpp>
#include <kvferry/tcp/frame_reader-inl.hpp>
#include <kvferry/tcp/gather_queue-inl.hpp>
#include <kvferry/tcp/hello-inl.hpp>
#include <kvferry/tcp/lane-inl.hpp>
#include <kvferry/tcp/lane_end-inl.hpp>
#include <kvferry/tcp/lane_lead-inl.hpp>
#include <kvferry/tcp/lane_protocol-inl.hpp>
#include <kvferry/tcp/lane_protocol_checksums-inl.hpp>
#include <kvferry/tcp/lane_protocol_end-inl.hpp>
#include <kvferry/tcp/lane_protocol_frames-inl.hpp>
#include <kvferry/tcp/lane_protocol_receive-inl.hpp>
#include <kvferry/tcp/lane_protocol_regions-inl.hpp>
#include <kvferry/tcp/lane_protocol_send-inl.hpp>
#include <kvferry/tcp/lane_protocol_shared-inl.hpp>
#include <kvferry/tcp/lane_steps-inl.hpp>
#include <kvferry/tcp/range_descriptors-inl.hpp>
#include <kvferry/tcp/read_ahead-inl.hpp>
#include <kvferry/tcp/socket_events-inl.hpp>
#include <kvferry/tcp/tcp_link-inl.hpp>
#include <kvferry/tcp/tls_stream-inl.hpp>
#include <kvferry/tcp_transfer_channel-inl.hpp>
