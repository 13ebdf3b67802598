// SPDX-License-Identifier: Apache-2.0
// The definitions of the handshake over ZeroMQ.
#pragma once

#include <kvferry/handshake/curve-inl.hpp>
#include <kvferry/handshake/handshake_attempts-inl.hpp>
#include <kvferry/handshake/handshake_gate-inl.hpp>
#include <kvferry/handshake/handshake_gate_accept-inl.hpp>
#include <kvferry/handshake/handshake_gate_bytes-inl.hpp>
#include <kvferry/handshake/handshake_listener-inl.hpp>
#include <kvferry/handshake/handshake_mailbox-inl.hpp>
#include <kvferry/handshake/handshake_questions-inl.hpp>
#include <kvferry/handshake/handshake_sockets-inl.hpp>
#include <kvferry/kit/handshake_service-inl.hpp>
