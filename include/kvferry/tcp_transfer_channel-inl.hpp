// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp_transfer_channel.hpp>

#include <asio/post.hpp>

#include <algorithm>
#include <utility>
#include <vector>

#include <kvferry/url.hpp>

#include <kvferry/detail/host_address.hpp>
#include <kvferry/detail/name_lookups.hpp>
#include <kvferry/detail/text.hpp>
#include <kvferry/kit/attempts.hpp>
#include <kvferry/kit/checks.hpp>
#include <kvferry/kit/endpoint_codec.hpp>
#include <kvferry/kit/stream_protocol.hpp>
#include <kvferry/kit/weak_calls.hpp>
#include <kvferry/tcp/allowed_hosts.hpp>
#include <kvferry/tcp/data_acceptor.hpp>
#include <kvferry/tcp/data_dialer.hpp>
#include <kvferry/tcp/frame.hpp>
#include <kvferry/tcp/hello.hpp>
#include <kvferry/tcp/system_code.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

KVFERRY_INLINE std::size_t bounded_lanes(std::uint64_t lanes) {
  return static_cast<std::size_t>(std::clamp<std::uint64_t>(lanes, 1, tcp::max_lanes));
}

using Dialers = kit::Attempts<tcp::DataDialer>;

/// By what a side encrypts.
enum class EncryptedBy : std::uint8_t { nothing, key, certificates };

KVFERRY_INLINE EncryptedBy encrypted_by(bool encrypts, bool shows_certificate) {
  if (shows_certificate) {
    return EncryptedBy::certificates;
  }
  return encrypts ? EncryptedBy::key : EncryptedBy::nothing;
}

KVFERRY_INLINE EncryptedBy encrypted_by(const tcp::LinkOptions& options) {
  return encrypted_by(options.tls != nullptr, options.certificates != nullptr);
}

/// How they differ, in few words: an answer has room for no more.
KVFERRY_INLINE std::string of_encryption(EncryptedBy here, const std::string& peer_id, EncryptedBy there) {
  const bool shown = here == EncryptedBy::certificates || there == EncryptedBy::certificates;
  const auto name = [shown](EncryptedBy way) -> std::string {
    switch (way) {
      case EncryptedBy::certificates: return "given";
      case EncryptedBy::key: return shown ? "none (encrypted by the handshake's key)" : "with_keyring or required";
      default: return shown ? "none (not encrypted)" : "off or unknown";
    }
  };
  return std::string(shown ? "TcpOptions::certificates: " : "TcpOptions::encryption: ") + name(here) + " here, " +
         name(there) + " at peer " + in_quotes(peer_id);
}

KVFERRY_INLINE void check_certificate_options(const TcpOptions& options) {
  const auto refuse = [](const std::string& why) {
    throw TransferError(std::make_error_code(std::errc::invalid_argument), "TcpOptions::certificates" + why);
  };
  const CertificateFiles& files = options.certificates;
  for (const auto& [name, path] :
       {std::pair{"chain", &files.chain}, std::pair{"key", &files.key}, std::pair{"trusted", &files.trusted}}) {
    if (path->empty()) {
      refuse(std::string(".") + name + " is empty, and others aren't: it takes a chain, a key and the certificates to trust");
    }
  }
  if (options.encryption == Encryption::off) {
    refuse(" are given, and TcpOptions::encryption is off");
  }
  if (!options.keyring) {
    refuse(" are given, and there is no ChannelOptions::keyring: nobody would know which peer has told of which certificate");
  }
}

/// @return null: data connections are not encrypted.
KVFERRY_INLINE std::shared_ptr<tcp::TlsContext> tls_of(const TcpOptions& options) {
  if (options.encryption == Encryption::required && !options.keyring) {
    throw TransferError(std::make_error_code(std::errc::invalid_argument),
                        "TcpOptions::encryption is required, and there is no ChannelOptions::keyring: the key that encrypts "
                        "would be told to everybody");
  }
  if (options.certificates != CertificateFiles()) {
    check_certificate_options(options);
  }
  return options.keyring && options.encryption != Encryption::off ? tcp::TlsContext::create() : nullptr;
}

class TcpDial final : public kit::Dial {
 public:
  TcpDial(asio::any_io_executor executor, tcp::LinkOptions options, std::size_t lanes, std::shared_ptr<Dialers> dialers,
          std::shared_ptr<kit::NameLookups> lookups, std::shared_ptr<const tcp::AllowedHosts> allowed)
      : executor_(std::move(executor)),
        options_(std::move(options)),
        lanes_(lanes),
        dialers_(std::move(dialers)),
        lookups_(std::move(lookups)),
        allowed_(std::move(allowed)),
        certificates_(options_.certificates ? options_.certificates->current() : nullptr) {}

  [[nodiscard]] Bytes local_endpoint() override {
    tcp::DialEndpoint endpoint{lanes_, options_.tls != nullptr};
    if (certificates_) {
      endpoint.certificate.emplace(certificates_->hash().begin(), certificates_->hash().end());
    }
    return kit::encode_endpoint(endpoint);
  }

  void connect(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint, kit::Clock::time_point deadline,
               kit::LinkHandler on_link) override {
    std::error_code ec;
    auto endpoint = kit::decode_endpoint<tcp::AcceptEndpoint>(remote_endpoint, ec);
    if (!ec &&
        (endpoint.port == 0 || endpoint.port > 65535 || endpoint.lanes == 0 || endpoint.lanes > lanes_ ||
         endpoint.dial_secret.size() != sizeof(tcp::Secret) || endpoint.accept_secret.size() != sizeof(tcp::Secret) ||
         (endpoint.tls_secret && endpoint.tls_secret->size() != sizeof(tcp::TlsKey::secret)) ||
         (endpoint.certificate && endpoint.certificate->size() != sizeof(tcp::CertificateHash)) ||
         (endpoint.tls_secret && endpoint.certificate) ||
         (endpoint.tls_secret || endpoint.certificate) != endpoint.tls_identity.has_value() ||
         (endpoint.tls_identity && endpoint.tls_identity->size() != sizeof(tcp::TlsKey::identity)))) {
      ec = errc::malformed_message;
    }
    if (ec) {
      asio::post(executor_, [ec, host = std::move(host), on_link = std::move(on_link)] {
        on_link(ec, nullptr,
                "peer " + in_quotes(host->peer().id) + " answered with a senseless tcp endpoint: " + ec.message());
      });
      return;
    }
    const EncryptedBy here = encrypted_by(options_);
    const EncryptedBy there = encrypted_by(endpoint.tls_secret.has_value(), endpoint.certificate.has_value());
    if (here != there) {
      asio::post(executor_, [here, there, host = std::move(host), on_link = std::move(on_link)] {
        on_link(errc::encryption_mismatch, nullptr, of_encryption(here, host->peer().id, there));
      });
      return;
    }
    if (const auto why = choose_host(endpoint, host->peer()); !why.empty()) {
      asio::post(executor_, [why, on_link = std::move(on_link)] { on_link(errc::handshake_failed, nullptr, why); });
      return;
    }
    auto dialer = std::make_shared<tcp::DataDialer>(executor_, options_, host, std::move(endpoint), lookups_,
                                                    std::move(on_link), certificates_);
    host->when_abandoned(kit::posted(executor_, std::weak_ptr(dialer), [](tcp::DataDialer& abandoned) {
      abandoned.fail(errc::cancelled, "it isn't wanted any more");
    }));
    if (dialers_->add(dialer)) {
      dialer->dial(deadline);
    } else {
      dialer->fail(errc::closed, "the channel was closed");
    }
  }

 private:
  /// Replaces what stands for the address that answered the handshake by that. @return why the host may not be
  /// connected to; empty if it may.
  [[nodiscard]] std::string choose_host(tcp::AcceptEndpoint& endpoint, const kit::PeerDescription& peer) const {
    const auto& reached = peer.reached_host;
    std::error_code ignored;
    const auto address = address_of(endpoint.host);
    if (endpoint.host.empty() || (!address && endpoint.host == parse_url(peer.init_url, ignored).host) ||
        (address && address == address_of(reached))) {
      endpoint.host = reached;
      return {};
    }
    const std::string who = "peer " + in_quotes(peer.id) + " has its data connections at " + in_quotes(endpoint.host);
    if (const auto why = why_not_dialable({endpoint.host, static_cast<std::uint16_t>(endpoint.port)}); !why.empty()) {
      return who + ": " + why;
    }
    if (!allowed_->allow(endpoint.host, reached)) {
      return who + ", neither the address that answered the handshake (" + reached + ") nor in allowed_hosts";
    }
    return {};
  }

  const asio::any_io_executor executor_;
  const tcp::LinkOptions options_;
  const std::size_t lanes_;
  const std::shared_ptr<Dialers> dialers_;
  const std::shared_ptr<kit::NameLookups> lookups_;
  const std::shared_ptr<const tcp::AllowedHosts> allowed_;
  /// The peer is told of these: they stay, whatever becomes of the files.
  const std::shared_ptr<const tcp::TlsCertificates> certificates_;
};

}  // namespace internal

class TcpTransferChannel::Impl {
 public:
  explicit Impl(const asio::any_io_executor& io_executor) : executor(io_executor) {}

  void listen(std::shared_ptr<kit::Refusals> refusals) {
    const HostPort init = parse_url(options.peer_init_url);
    const std::string host = options.data_host.empty() ? init.host : options.data_host;
    acceptor = std::make_shared<tcp::DataAcceptor>(executor, link_options, std::move(refusals));
    acceptor->listen(host, options.data_port, options.handshake_timeout, init.port);
    if (options.advertised_data_address.empty() && !options.data_host.empty() && !HostPort{host, 0}.is_wildcard() &&
        zone_of(host).empty()) {
      advertised_data.host = host;
    }
  }

  const asio::any_io_executor executor;
  TcpOptions options;
  tcp::LinkOptions link_options;
  std::shared_ptr<Dialers> dialers = std::make_shared<Dialers>();
  std::shared_ptr<kit::NameLookups> lookups = std::make_shared<kit::NameLookups>();
  std::shared_ptr<const tcp::AllowedHosts> allowed_hosts;
  std::shared_ptr<tcp::DataAcceptor> acceptor;
  std::shared_ptr<tcp::SocketEvents> events;
  std::shared_ptr<tcp::ReadAheadPool> buffers = tcp::ReadAheadPool::create(tcp::FrameReader::read_ahead);
  std::shared_ptr<tcp::TrafficOfLanes> traffic = std::make_shared<tcp::TrafficOfLanes>();
  HostPort advertised_data;  ///< Without host: wherever the handshake was answered.
};

KVFERRY_INLINE TcpTransferChannel::TcpTransferChannel(TcpOptions options) try
    // NOLINTNEXTLINE(cppcoreguidelines-slicing): its part
    : TransferChannelKit(options), impl_(std::make_shared<Impl>(get_executor())) {
  impl_->options = std::move(options);
  const TcpOptions& given = impl_->options;
  const auto bounded = [](std::chrono::milliseconds time) {
    return std::clamp<std::chrono::milliseconds>(time, std::chrono::milliseconds::zero(), std::chrono::hours(1));
  };
  impl_->events = std::make_shared<tcp::SocketEvents>(get_executor());
  impl_->link_options = {
      incarnation(),
      bounded(given.hello_timeout),
      {given.stripe_threshold,
       std::clamp<std::chrono::microseconds>(given.poll.spin, std::chrono::microseconds::zero(), std::chrono::hours(1)),
       {bounded(given.drain_timeout),
        impl_->events,
        poller(),
        {},
        impl_->buffers,
        std::max<std::chrono::milliseconds>(bounded(given.frame_timeout), std::chrono::milliseconds(10))},
       impl_->traffic,
       {}},
      {given.send_buffer, given.receive_buffer,
       std::clamp<std::chrono::seconds>(given.keepalive_idle, std::chrono::seconds::zero(), std::chrono::hours(1)),
       bounded(given.user_timeout), given.congestion_control, given.same_host_congestion_control}};
  if (!given.advertised_data_address.empty()) {
    impl_->advertised_data = parse_url(given.advertised_data_address);
    if (impl_->advertised_data.is_wildcard()) {
      impl_->advertised_data.host.clear();
    }
  }
  try {
    kit::refuse_dmabufs(given.regions, "tcp");
    impl_->allowed_hosts = std::make_shared<const tcp::AllowedHosts>(given.allowed_hosts);
    impl_->link_options.tls = tls_of(given);
    if (given.certificates != CertificateFiles()) {
      impl_->link_options.certificates =
          std::make_shared<tcp::Certificates>(impl_->link_options.tls, given.certificates, logger());
    }
    if (impl_->link_options.tls) {
      impl_->buffers = tcp::ReadAheadPool::create(tcp::encrypted_read_ahead);
      impl_->link_options.link.lane.buffers = impl_->buffers;
    }
    tcp::check_congestion_control(given.congestion_control);
    if (given.same_host_congestion_control != TcpOptions().same_host_congestion_control) {
      tcp::check_congestion_control(given.same_host_congestion_control);  // nobody has asked for the default one
    }
    if (!given.peer_init_url.empty()) {
      impl_->listen(refusals());
    }
    start();
  } catch (...) {
    // Listeners keep the I/O threads busy.
    stop_listening();
    close();
    throw;
  }
} catch (const TransferError&) {
  throw;
} catch (const std::system_error& error) {
  throw TransferError(tcp::system_code(error.code()), std::string("what the data connections share: ") + error.what());
}

KVFERRY_INLINE TcpTransferChannel::~TcpTransferChannel() {
  if (inherited()) {
    keep_inherited(std::move(impl_));
    return;
  }
  close();
  run_handlers_left();
}

KVFERRY_INLINE std::string_view TcpTransferChannel::transport() const noexcept { return "tcp"; }

KVFERRY_INLINE Capabilities TcpTransferChannel::capabilities() const noexcept {
  return kit::stream_capabilities;
}

KVFERRY_INLINE ChannelStats TcpTransferChannel::stats() const {
  ChannelStats stats = TransferChannelKit::stats();
  for (std::size_t i = 0; i < bounded_lanes(impl_->options.lanes_per_peer); ++i) {
    const tcp::LaneTraffic& lane = impl_->traffic->at(i);
    stats.paths.push_back({"lane " + std::to_string(i), lane.sent, lane.received});
  }
  return stats;
}

KVFERRY_INLINE std::uint16_t TcpTransferChannel::data_port() const {
  return inherited() || impl_->acceptor == nullptr ? std::uint16_t{0} : impl_->acceptor->port();
}

KVFERRY_INLINE std::unique_ptr<kit::Dial> TcpTransferChannel::dial(const std::string&) {
  return std::make_unique<TcpDial>(get_executor(), impl_->link_options, bounded_lanes(impl_->options.lanes_per_peer),
                                   impl_->dialers, impl_->lookups, impl_->allowed_hosts);
}

KVFERRY_INLINE Bytes TcpTransferChannel::accept(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint,
                                                kit::Clock::time_point deadline, kit::LinkHandler on_link) {
  std::error_code ec;
  const auto dialing = kit::decode_endpoint<tcp::DialEndpoint>(remote_endpoint, ec);
  if (ec) {
    throw TransferError(ec, "peer " + in_quotes(host->peer().id) + " asked with a senseless tcp endpoint");
  }
  tcp::CertificateHash certificate{};
  if (dialing.certificate) {
    const std::size_t size = dialing.certificate->size();
    if (size != certificate.size() || !dialing.encrypted.value_or(false)) {
      throw TransferError(errc::malformed_message,
                          "peer " + in_quotes(host->peer().id) + " tells of a certificate " +
                              (size == certificate.size() ? "for connections that aren't to be encrypted"
                                                          : "by " + std::to_string(size) + " bytes; SHA-256 has " +
                                                                std::to_string(certificate.size())));
    }
    std::ranges::copy(*dialing.certificate, certificate.begin());
  }
  const EncryptedBy here = encrypted_by(impl_->link_options);
  const EncryptedBy there = encrypted_by(dialing.encrypted.value_or(false), dialing.certificate.has_value());
  if (here != there) {
    throw TransferError(errc::encryption_mismatch, of_encryption(here, host->peer().id, there));
  }
  const std::size_t lanes = std::min(bounded_lanes(dialing.lanes), bounded_lanes(impl_->options.lanes_per_peer));
  auto endpoint = impl_->acceptor->expect(std::move(host), lanes, deadline, std::move(on_link), certificate);
  endpoint.host = impl_->advertised_data.host;
  if (impl_->advertised_data.port != 0) {
    endpoint.port = impl_->advertised_data.port;
  }
  return kit::encode_endpoint(endpoint);
}

KVFERRY_INLINE bool TcpTransferChannel::leaves_host_in_the_clear() const noexcept {
  return impl_->link_options.tls == nullptr;
}

KVFERRY_INLINE void TcpTransferChannel::stop_listening() {
  impl_->dialers->close([](tcp::DataDialer& dialer) { dialer.fail(errc::closed, "the channel was closed"); });
  impl_->lookups->close();  // lets go of the dialers that waited for it
  if (impl_->acceptor) {
    impl_->acceptor->close();
  }
  if (impl_->events) {
    impl_->events->close();
  }
}

}  // namespace kvferry
