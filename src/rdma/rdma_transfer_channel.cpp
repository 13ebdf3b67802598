// SPDX-License-Identifier: Apache-2.0
#include <kvferry/rdma_transfer_channel.hpp>

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/url.hpp>

#include <kvferry/detail/text.hpp>
#include <kvferry/kit/attempts.hpp>
#include <kvferry/kit/endpoint_codec.hpp>
#include <kvferry/kit/failure.hpp>
#include "checksums.hpp"
#include "endpoint.hpp"
#include "in_parallel.hpp"
#include "join_threads.hpp"
#include "message.hpp"
#include "rail_device.hpp"
#include "rail_domain.hpp"
#include "rdma_link.hpp"

namespace kvferry::inline KVFERRY_ABI {
namespace {

using Links = kit::Attempts<rdma::RdmaLink>;

/// Peers whose greetings are awaited at a time: each costs the queue pairs of a connection.
constexpr std::size_t max_joining = 256;

/// An adapter waits 4.096 us times 2 to the power of this.
std::uint8_t timeout_exponent(std::chrono::milliseconds timeout) {
  const double wanted_us = static_cast<double>(std::max<std::int64_t>(timeout.count(), 1)) * 1000;
  std::uint8_t exponent = 1;
  while (exponent < 31 && 4.096 * static_cast<double>(std::uint64_t{1} << exponent) < wanted_us) {
    ++exponent;
  }
  return exponent;
}

/// Beyond this they wait for each other: what is registered takes the kernel locks of the process's memory.
std::size_t registering_threads() { return std::clamp<std::size_t>(std::thread::hardware_concurrency(), 2, 8); }

/// To register so many bytes on each of several rails.
std::size_t threads_for_rails(std::size_t bytes) {
  return bytes < rdma::RegistrationOptions::large ? 1 : registering_threads();
}

/// When the channel closes. A link whose handler is being called at this moment is nobody else's to shut.
void end_attempt(rdma::RdmaLink& link) {
  link.fail(errc::closed, "the channel was closed");
  link.shut(errc::closed, "the channel was closed");
}

class RdmaDial final : public kit::Dial {
 public:
  RdmaDial(std::shared_ptr<rdma::RdmaLink> link, std::shared_ptr<Links> attempts,
           std::shared_ptr<rdma::JoinThreads> threads)
      : link_(std::move(link)), attempts_(std::move(attempts)), threads_(std::move(threads)) {}
  RdmaDial(const RdmaDial&) = delete;
  RdmaDial& operator=(const RdmaDial&) = delete;
  ~RdmaDial() override {
    if (!joined_) {
      link_->shut(errc::cancelled, "the attempt to connect was given up");
    }
  }

  [[nodiscard]] Bytes local_endpoint() override { return kit::encode_endpoint(link_->endpoint()); }

  void connect(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint, kit::Clock::time_point deadline,
               kit::LinkHandler on_link) override {
    // Shared, because `join` takes it only if it doesn't throw. It keeps this attempt.
    threads_->run([this, host = std::move(host), remote_endpoint, deadline,
                   shared = std::make_shared<kit::LinkHandler>(std::move(on_link))] {
      try {
        try {
          join(host, remote_endpoint, deadline, shared);
        } catch (...) {
          const auto failure = kit::failure_being_handled();
          (*shared)(failure.code, nullptr, failure.sentence);
        }
      } catch (...) {
        // Not even that could be told: the attempt ends with its deadline.
      }
    });
  }

 private:
  void join(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint, kit::Clock::time_point deadline,
            const std::shared_ptr<kit::LinkHandler>& on_link) {
    if (attempts_->closed()) {
      throw TransferError(errc::closed, "the channel was closed");
    }
    std::error_code ec;
    const auto endpoint = kit::decode_endpoint<rdma::Endpoint>(remote_endpoint, ec);
    if (ec) {
      throw TransferError(
          ec, "peer " + in_quotes(host->peer().id) + " answered with a senseless rdma endpoint: " + ec.message());
    }
    link_->join(std::move(host), endpoint, rdma::Role::dialing, deadline,
                [on_link](std::error_code error, std::shared_ptr<kit::Link> link, std::string diagnostic) {
                  (*on_link)(error, std::move(link), std::move(diagnostic));
                });
    joined_ = true;
    if (!attempts_->add(link_)) {
      end_attempt(*link_);
    }
    link_->regions_deregistered();  // before it was known here
  }

  const std::shared_ptr<rdma::RdmaLink> link_;
  const std::shared_ptr<Links> attempts_;
  const std::shared_ptr<rdma::JoinThreads> threads_;
  bool joined_ = false;
};

}  // namespace

class RdmaTransferChannel::Impl {
 public:
  Impl(const asio::any_io_executor& io_executor, const RdmaOptions& given, std::uint64_t incarnation)
      : executor(io_executor),
        join_threads(std::make_shared<rdma::JoinThreads>(kit::SideMessageQueue::Bounds{
            given.max_pending_side_message_bytes, given.max_pending_side_message_bytes_of_source})) {
    const auto bounded = [](auto time) {
      return std::clamp<decltype(time)>(time, decltype(time)::zero(), std::chrono::hours(1));
    };
    link_options.incarnation = incarnation;
    link_options.stripe_threshold = given.stripe_threshold;
    link_options.queue_pairs = std::clamp<std::size_t>(given.queue_pairs_per_rail, 1, rdma::max_queue_pairs);
    link_options.queue_pair_threshold = given.queue_pair_threshold;
    rdma::RailOptions& rail = link_options.rail;
    rail.keepalive_interval = bounded(given.keepalive_interval);
    rail.drain_timeout = bounded(given.drain_timeout);
    rail.parts_timeout = std::max<std::chrono::milliseconds>(bounded(given.parts_timeout), std::chrono::milliseconds(10));
    rail.spin = bounded(given.poll.spin);
    rail.queue_pair.queue_depth = std::clamp<std::size_t>(given.queue_depth, 16, 16384);
    rail.queue_pair.read_depth = std::clamp<std::size_t>(given.read_depth, 1, 255);
    rail.queue_pair.eager_bytes = std::min<std::size_t>(given.eager_bytes, 4096);
    rail.queue_pair.timeout_exponent = timeout_exponent(given.ack_timeout);
    rail.queue_pair.retry_count = static_cast<std::uint8_t>(std::min(given.retry_count, 6U));
    rail.queue_pair.service_level = given.service_level;
    rail.queue_pair.traffic_class = given.traffic_class;
  }

  void open(const RdmaOptions& given) {
    trusted_fabric = given.trusted_fabric;
    if (given.isolate_peers) {
      link_options.aside = join_threads;
    }
    link_options.rail.look = std::make_shared<const rdma::MemoryLook>();
    std::string host;
    for (const auto* url : {&given.advertised_init_url, &given.peer_init_url}) {
      if (host.empty() && !url->empty()) {
        host = parse_url(*url).host;
      }
    }
    auto rails = given.rails;
    if (rails.empty()) {
      rails.push_back(rdma::default_rail(host));
    }
    if (rails.size() > rdma::max_rails) {
      throw TransferError(std::make_error_code(std::errc::invalid_argument),
                          std::to_string(rails.size()) + " rails, at most " + std::to_string(rdma::max_rails));
    }
    const rdma::RegistrationOptions registration{
        .slice_bytes = std::max<std::size_t>(given.slice_bytes / 4096 * 4096, 4096),
        .relaxed_ordering = given.relaxed_ordering,
        .threads = std::max<std::size_t>(registering_threads() / rails.size(), 1)};
    const auto use = given.isolate_peers ? rdma::RailDomain::Use::of_link : rdma::RailDomain::Use::of_channel;
    std::vector<rdma::RailPort> made;
    for (const RdmaRail& rail : rails) {
      auto device = std::make_shared<rdma::RailDevice>(rail, host);
      made.push_back({device, std::make_shared<rdma::DeviceEvents>(executor, device), nullptr});
    }
    std::size_t bytes = 0;
    for (const MemoryRegion& region : given.regions) {
      bytes += region.size;
    }
    rdma::in_parallel(threads_for_rails(bytes), made.size(), [&](std::size_t i) {
      made[i].domains = std::make_shared<rdma::RailDomains>(made[i].device, given.regions, registration, use);
    });
    ports = std::move(made);
    for (const rdma::RailPort& port : ports) {
      port.events->start();
    }
  }

  const asio::any_io_executor executor;
  bool trusted_fabric = false;
  rdma::LinkOptions link_options;
  std::vector<rdma::RailPort> ports;
  std::shared_ptr<Links> attempts = std::make_shared<Links>();
  std::shared_ptr<rdma::JoinThreads> join_threads;
  std::shared_ptr<std::atomic<std::size_t>> accepting = std::make_shared<std::atomic<std::size_t>>(0);
};

// NOLINTNEXTLINE(performance-unnecessary-value-param): as the other channels'
RdmaTransferChannel::RdmaTransferChannel(RdmaOptions options)
    // NOLINTNEXTLINE(cppcoreguidelines-slicing): its part
    : TransferChannelKit(options), impl_(std::make_shared<Impl>(get_executor(), options, incarnation())) {
  try {
    impl_->open(options);
    start();
  } catch (...) {
    close();
    throw;
  }
}

RdmaTransferChannel::~RdmaTransferChannel() {
  if (inherited()) {
    keep_inherited(std::move(impl_));
    return;
  }
  close();
  run_handlers_left();
}

std::vector<RdmaRail> RdmaTransferChannel::active_rails() { return rdma::active_rails(); }

std::string_view RdmaTransferChannel::transport() const noexcept { return "rdma"; }

Capabilities RdmaTransferChannel::capabilities() const noexcept {
  return {.send_recv = true,
          .write = true,
          .read = true,
          .notifications = true,
          .ranges = true,
          .unregistered_objects = true,
          .checksums = true,
          .region_changes = true,
          .max_notification_bytes = rdma::max_notification_bytes};
}

ChannelStats RdmaTransferChannel::stats() const {
  ChannelStats stats = TransferChannelKit::stats();
  for (const RdmaRailInfo& rail : rails()) {
    // With its number, because two rails may share a port.
    stats.paths.push_back(
        {"rail " + std::to_string(stats.paths.size()) + " " + rail.device + ":" + std::to_string(rail.port),
         rail.bytes_written, rail.bytes_read});
  }
  return stats;
}

std::vector<RdmaRailInfo> RdmaTransferChannel::rails() const {
  std::vector<RdmaRailInfo> rails;
  for (const auto& port : impl_->ports) {
    const rdma::RailDevice& device = *port.device;
    rails.push_back({device.name(), device.port(), device.bytes_written, device.bytes_read, device.window.counted()});
  }
  return rails;
}

std::unique_ptr<kit::Dial> RdmaTransferChannel::dial(const std::string&) {
  return std::make_unique<RdmaDial>(rdma::RdmaLink::create(get_executor(), impl_->ports, impl_->link_options),
                                    impl_->attempts, impl_->join_threads);
}

bool RdmaTransferChannel::run_accept(const std::string& source, std::size_t bytes, std::function<void()> answer) {
  return impl_->join_threads->run_for(source, bytes, std::move(answer));
}

Bytes RdmaTransferChannel::accept(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint,
                                  kit::Clock::time_point deadline, kit::LinkHandler on_link) {
  std::error_code ec;
  const auto endpoint = kit::decode_endpoint<rdma::Endpoint>(remote_endpoint, ec);
  if (ec) {
    throw TransferError(ec, "peer " + in_quotes(host->peer().id) + " asked with a senseless rdma endpoint");
  }
  const std::size_t joining = ++*impl_->accepting;
  // Counted until the handler is gone, whatever becomes of it.
  const std::shared_ptr<void> counted(nullptr, [count = impl_->accepting](void*) { --*count; });
  if (joining > max_joining) {
    throw TransferError(errc::resource_limit, std::to_string(joining) + " handshakes await their peers' greetings");
  }
  rdma::LinkOptions options = impl_->link_options;
  std::size_t peers_pairs = 1;
  for (const rdma::RailEndpoint& rail : endpoint.rails) {
    peers_pairs = std::max(peers_pairs, rdma::queue_pairs_of(rail));
  }
  options.queue_pairs = std::min(options.queue_pairs, peers_pairs);
  const auto link = rdma::RdmaLink::create(get_executor(), impl_->ports, options);
  link->join(std::move(host), endpoint, rdma::Role::accepting, deadline,
             [counted, handler = std::move(on_link)](std::error_code error, std::shared_ptr<kit::Link> made,
                                                     std::string diagnostic) {
               handler(error, std::move(made), std::move(diagnostic));
             });
  if (!impl_->attempts->add(link)) {
    end_attempt(*link);
  }
  link->regions_deregistered();
  return kit::encode_endpoint(link->endpoint());
}

/// On all rails or on none.
void RdmaTransferChannel::register_region(const LocalRegion& region) {
  const auto& ports = impl_->ports;
  std::vector<std::atomic<bool>> registered(ports.size());
  try {
    rdma::in_parallel(threads_for_rails(region.size), ports.size(), [&](std::size_t i) {
      ports[i].domains->register_region(region);
      registered[i] = true;
    });
  } catch (...) {
    for (std::size_t i = 0; i < ports.size(); ++i) {
      if (registered[i]) {
        ports[i].domains->deregister_region(region.number);
      }
    }
    throw;
  }
}

std::function<void(std::uint32_t)> RdmaTransferChannel::region_forgetter() {
  std::vector<std::shared_ptr<rdma::RailDomains>> rails;
  for (const auto& port : impl_->ports) {
    rails.push_back(port.domains);
  }
  return [rails = std::move(rails), attempts = impl_->attempts](std::uint32_t number) {
    for (const auto& rail : rails) {
      rail->deregister_region(number);
    }
    attempts->for_each([](rdma::RdmaLink& link) { link.regions_deregistered(); });
  };
}

bool RdmaTransferChannel::leaves_host_in_the_clear() const noexcept { return !impl_->trusted_fabric; }

void RdmaTransferChannel::stop_listening() {
  impl_->attempts->close(end_attempt);
  impl_->join_threads->close();
  // All links have been shut, also those that were on their way to the channel: no queue pair is left that could reach the
  // regions.
  for (const auto& port : impl_->ports) {
    port.events->close();
    port.domains->close();
  }
}

}  // namespace kvferry
