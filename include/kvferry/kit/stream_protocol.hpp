// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_tcp.hpp>
#ifndef KVFERRY_KIT_STREAM_PROTOCOL_HPP
#define KVFERRY_KIT_STREAM_PROTOCOL_HPP

#include <kvferry/tcp/lane_protocol.hpp>
#include <kvferry/transfer_spec.hpp>

namespace kvferry::inline KVFERRY_ABI::kit {

/// What two channels say to each other on an ordered, reliable stream of bytes, without the stream: for links over sockets
/// of any kind. It is what travels on TCP's data connections (docs/wire_protocol.md), so its functions are in the component
/// `tcp`.
///
/// A link hands it operations (`start`, `stop`), passes on what it is asked (`probe`, `fence`, `region_added`,
/// `region_removed`), calls `region_added` once itself before it sends anything, has it queue frames (`fill`), sends the
/// bytes of `out().front(...)` and reports them (`sent`), receives to where `reader().prepare(...)` says - or throws
/// `reader().discardable()` bytes away - and reports these (`received`). It ends the operations; when the stream breaks
/// they end by `fail`. After `received`, if `take_fence()` holds, the link calls `answer_fence` when
/// `LinkHost::when_writes_ended` says so, which must not be within that call.
///
/// Payload moves between the buffers of operations and the stream without a copy, but for the few kilobytes of it that
/// come in one read with a frame's header. The buffers of an operation are in use until it has ended. What the peer
/// sends can't make the protocol's memory grow without bound; what breaks the rules is an error of `received`, and
/// `violation()` says how.
///
/// Thread safety: one thread at a time, but for `take_used`. It calls `Operation::finish`, the functions given to `probe`,
/// `fence` and `region_removed`, and `LinkHost` (notifications, memory, regions), and expects no call back meanwhile.
using StreamProtocol = tcp::LaneProtocol;

/// What a transport can do whose links use it.
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
