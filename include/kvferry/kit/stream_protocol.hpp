// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_tcp.hpp>
#ifndef KVFERRY_KIT_STREAM_PROTOCOL_HPP
#define KVFERRY_KIT_STREAM_PROTOCOL_HPP

#include <kvferry/tcp/lane_protocol.hpp>
#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// The protocol of two channels on an ordered, reliable stream of bytes, without the stream: for links over any kind of
/// socket. It is the protocol of TCP's data connections (docs/wire_protocol.md), so its functions are in the component
/// `tcp`.
///
/// A link hands it operations (`start`, `stop`), and passes questions on (`probe`, `fence`, `region_added`,
/// `region_removed`). It calls `region_added` once by itself before it sends anything. To send, it lets the protocol
/// queue frames (`fill`), sends the bytes of `out().front(...)` and reports them (`sent`). To receive, it reads into
/// the memory that `reader().prepare(...)` returns, or throws `reader().discardable()` bytes away, and reports these
/// bytes (`received`). The protocol ends the operations; when the stream breaks they end by `fail`. After `received`,
/// if `take_fence()` is true, the link calls `answer_fence` when `LinkHost::when_writes_ended` has called back, but not
/// within that call.
///
/// Payload moves between the buffers of operations and the stream without a copy, except for the few kilobytes that
/// come in one read with a frame's header. The buffers of an operation are in use until it has ended. The peer can't
/// make the protocol's memory grow without bound. If it breaks the rules, `received` returns an error, and
/// `violation()` describes it.
///
/// Thread safety: one thread at a time, except for `take_used`. It calls `Operation::finish`, the functions given to
/// `probe`, `fence` and `region_removed`, and `LinkHost` (notifications, memory, regions). None of these may call back.
using StreamProtocol = tcp::LaneProtocol;

/// The capabilities of a transport whose links use it.
inline constexpr Capabilities stream_capabilities{.send_recv = true,
                                                  .write = true,
                                                  .read = true,
                                                  .notifications = true,
                                                  .ranges = true,
                                                  .unregistered_objects = true,
                                                  .checksums = true,
                                                  .region_changes = true,
                                                  .max_notification_bytes = tcp::max_notification_bytes};

}  // namespace kvferry::kit

#endif  // KVFERRY_KIT_STREAM_PROTOCOL_HPP
