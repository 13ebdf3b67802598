// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/shm_transfer_channel.hpp>

#include <algorithm>
#include <utility>

#include <kvferry/detail/text.hpp>
#include <kvferry/kit/attempts.hpp>
#include <kvferry/kit/checks.hpp>
#include <kvferry/kit/endpoint_codec.hpp>
#include <kvferry/kit/make_dial.hpp>
#include <kvferry/kit/random_bytes.hpp>
#include <kvferry/kit/stream_protocol.hpp>
#include <kvferry/kit/weak_calls.hpp>
#include <kvferry/shm/awaited_meetings.hpp>
#include <kvferry/shm/meeting.hpp>
#include <kvferry/tcp/system_code.hpp>

namespace kvferry::inline KVFERRY_ABI {
namespace shm {
inline namespace internal {

/// A meeting. @throws TransferError
template <class... Arguments>
[[nodiscard]] std::shared_ptr<Meeting> meet(Arguments&&... arguments) {
  try {
    return std::make_shared<Meeting>(std::forward<Arguments>(arguments)...);
  } catch (const std::system_error& error) {
    throw TransferError(tcp::system_code(error.code()), "waiting at a Unix-domain socket");
  }
}

KVFERRY_INLINE void end_when_abandoned(kit::LinkHost& host, const std::shared_ptr<Meeting>& meeting,
                                       const asio::any_io_executor& executor) {
  host.when_abandoned(kit::posted(executor, std::weak_ptr(meeting), [](Meeting& abandoned) {
    abandoned.fail(errc::cancelled, "it isn't wanted any more");
  }));
}

}  // namespace internal
}  // namespace shm

class ShmTransferChannel::Impl {
 public:
  std::shared_ptr<shm::AwaitedMeetings> awaited =
      std::make_shared<shm::AwaitedMeetings>(shm::AwaitedMeetings::most_of_process());
  std::shared_ptr<kit::Attempts<shm::Meeting>> meetings = std::make_shared<kit::Attempts<shm::Meeting>>();
  std::shared_ptr<tcp::TrafficOfLanes> traffic = std::make_shared<tcp::TrafficOfLanes>();
  std::shared_ptr<shm::MemoryTraffic> memory_traffic = std::make_shared<shm::MemoryTraffic>();
  std::shared_ptr<tcp::SocketEvents> events;
  std::shared_ptr<const shm::MeetingOptions> options;
};

KVFERRY_INLINE ShmTransferChannel::ShmTransferChannel(ShmOptions options) try
    : TransferChannelKit(options), impl_(std::make_shared<Impl>()) {  // NOLINT(cppcoreguidelines-slicing): its part
  const auto bounded = [](std::chrono::milliseconds time, std::chrono::milliseconds least) {
    return std::clamp<std::chrono::milliseconds>(time, least, std::chrono::hours(1));
  };
  impl_->events = std::make_shared<tcp::SocketEvents>(get_executor());
  shm::MeetingOptions shared;
  shared.incarnation = incarnation();
  shared.allowed_users = std::move(options.allowed_users);
  shared.process_memory = options.process_memory;
  shared.process_memory_threshold = std::max<std::size_t>(options.process_memory_threshold, 1);
  shared.memory_traffic = impl_->memory_traffic;
  shared.logger = logger();
  shared.refusals = refusals();
  shared.link.patience = std::clamp<std::chrono::microseconds>(options.poll.spin, std::chrono::microseconds::zero(),
                                                               std::chrono::hours(1));
  shared.link.traffic = impl_->traffic;
  shared.link.lane.drain_timeout = bounded(options.drain_timeout, std::chrono::milliseconds::zero());
  shared.link.lane.frame_timeout = bounded(options.frame_timeout, std::chrono::milliseconds(10));
  shared.link.lane.events = impl_->events;
  shared.link.lane.poller = poller();
  shared.link.lane.buffers = tcp::ReadAheadPool::create(tcp::FrameReader::read_ahead);
  impl_->options = std::make_shared<const shm::MeetingOptions>(std::move(shared));
  try {
    kit::refuse_dmabufs(options.regions, "shm");
    start();
  } catch (...) {
    // Waits for events keep the I/O threads busy.
    stop_listening();
    close();
    throw;
  }
} catch (const TransferError&) {
  throw;
} catch (const std::system_error& error) {
  throw TransferError(tcp::system_code(error.code()), std::string("what the connections share: ") + error.what());
}

KVFERRY_INLINE ShmTransferChannel::~ShmTransferChannel() {
  if (inherited()) {
    keep_inherited(std::move(impl_));
    return;
  }
  close();
  run_handlers_left();
}

KVFERRY_INLINE std::string_view ShmTransferChannel::transport() const noexcept { return "shm"; }

KVFERRY_INLINE Capabilities ShmTransferChannel::capabilities() const noexcept { return kit::stream_capabilities; }

KVFERRY_INLINE ChannelStats ShmTransferChannel::stats() const {
  ChannelStats stats = TransferChannelKit::stats();
  stats.paths.push_back({"socket", impl_->traffic->front().sent, impl_->traffic->front().received});
  stats.paths.push_back({"process memory", impl_->memory_traffic->read.sent, impl_->memory_traffic->read.received});
  stats.paths.push_back({"shared memory", impl_->memory_traffic->mapped.sent, impl_->memory_traffic->mapped.received});
  return stats;
}

KVFERRY_INLINE std::unique_ptr<kit::Dial> ShmTransferChannel::dial(const std::string&) {
  return kit::make_dial({}, [executor = get_executor(), meetings = impl_->meetings, options = impl_->options](
                                const std::shared_ptr<kit::LinkHost>& host, const Bytes& remote_endpoint,
                                kit::Clock::time_point deadline, kit::LinkHandler on_link) {
    const std::string who = "peer " + in_quotes(host->peer().id);
    std::error_code ec;
    const auto endpoint = kit::decode_endpoint<shm::AcceptEndpoint>(remote_endpoint, ec);
    if (ec || endpoint.name.size() != shm::name_bytes || endpoint.dial_secret.size() != sizeof(tcp::Secret) ||
        endpoint.accept_secret.size() != sizeof(tcp::Secret)) {
      throw TransferError(errc::malformed_message, who + " answered with a senseless shm endpoint");
    }
    Descriptor socket;
    try {
      socket = shm::connect_to(endpoint.name);
    } catch (const TransferError& error) {
      const bool absent = error.code() == std::errc::connection_refused;
      throw TransferError(error.code(),
                          who +
                              (absent ? " has gone, or is on another host or in another network namespace: "
                                      : ": connecting to its Unix-domain socket: ") +
                              error.code().message());
    }
    const auto meeting = shm::meet(executor, options, host, std::move(socket), false, endpoint, std::move(on_link));
    shm::end_when_abandoned(*host, meeting, executor);
    meeting->begin(*meetings, deadline);
  });
}

KVFERRY_INLINE Bytes ShmTransferChannel::accept(std::shared_ptr<kit::LinkHost> host, const Bytes&,
                                                kit::Clock::time_point deadline, kit::LinkHandler on_link) {
  const shm::AcceptEndpoint endpoint{kit::random_bytes(shm::name_bytes), kit::random_bytes(secret_bytes),
                                     kit::random_bytes(secret_bytes)};
  auto settled = [place = impl_->awaited->enter(host->peer().source), on_link = std::move(on_link)](
                     std::error_code ec, std::shared_ptr<kit::Link> link, std::string diagnostic) {
    on_link(ec, std::move(link), std::move(diagnostic));
  };
  const auto meeting = shm::meet(get_executor(), impl_->options, host, shm::listen_at(endpoint.name), true, endpoint,
                                 std::move(settled));
  shm::end_when_abandoned(*host, meeting, get_executor());
  meeting->begin(*impl_->meetings, deadline);
  return kit::encode_endpoint(endpoint);
}

KVFERRY_INLINE bool ShmTransferChannel::leaves_host_in_the_clear() const noexcept { return false; }

KVFERRY_INLINE void ShmTransferChannel::stop_listening() {
  impl_->meetings->close([](shm::Meeting& meeting) { meeting.fail(errc::closed, "the channel was closed"); });
  if (impl_->events) {
    impl_->events->close();
  }
}

}  // namespace kvferry
