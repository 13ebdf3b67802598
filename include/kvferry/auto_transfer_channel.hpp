// SPDX-License-Identifier: Apache-2.0
#include <kvferry/detail/whole_auto.hpp>
#ifndef KVFERRY_AUTO_TRANSFER_CHANNEL_HPP
#define KVFERRY_AUTO_TRANSFER_CHANNEL_HPP

#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <kvferry/channel_options.hpp>
#include <kvferry/config.hpp>
#include <kvferry/kit/transfer_channel_kit.hpp>

namespace kvferry::inline KVFERRY_ABI {

/// A transport among those of an `AutoTransferChannel`. See `road`.
struct AutoRoad {
  /// What both sides call it: 1 to 32 bytes of UTF-8 without control characters. `PeerInfo::path`, errors and
  /// `AutoOptions::require` name it so.
  std::string name;
  /// Makes the transport's channel of the options that all channels have, which come from the `AutoTransferChannel`.
  /// Called by its constructor. The options have to reach the transport's, whole.
  std::function<std::unique_ptr<kit::TransferChannelKit>(ChannelOptions)> make;
  /// It leads to no other host, and is tried only where both sides are on one.
  bool within_host = false;
};

/// Called by `road`: compares the road's own options with those of the `AutoTransferChannel`, which replace them.
/// @param own the road's. @param common the `AutoTransferChannel`'s.
/// @throws TransferError EINVAL: an option of the road's would be lost silently.
KVFERRY_EXPORT void check_options_of_road(const std::string& name, const ChannelOptions& own,
                                          const ChannelOptions& common);

/// A road over a transport, of kvferry's or your own. Where peers have roads of one transport twice, on two networks,
/// say, their names tell them apart.
/// @tparam Channel a subclass of `kit::TransferChannelKit`: `RdmaTransferChannel`.
/// @param options the transport's own; what of it is a `ChannelOptions` is replaced by the `AutoTransferChannel`'s. One that
///   is set here, and isn't the same there, is an error of the constructor's: EINVAL. Of `poll` nothing is compared, and a log
///   sink only with none.
template <class Channel, class Options>
[[nodiscard]] AutoRoad road(std::string name, Options options, bool within_host = false) {
  return {name,
          [name, options = std::move(options)](ChannelOptions common) {
            check_options_of_road(name, options, common);
            Options own = options;
            static_cast<ChannelOptions&>(own) = std::move(common);
            return std::make_unique<Channel>(std::move(own));
          },
          within_host};
}

/// Options of a channel that chooses among transports.
struct AutoOptions : ChannelOptions {
  /// The transports, the best first; at most 16. Empty: `AutoTransferChannel::default_roads()`. A single one is pinned.
  std::vector<AutoRoad> roads;

  /// The names of the roads that may be taken. Without a way over one of these, connecting ends with `errc::no_path`,
  /// and so do operations that have to connect anew. The other roads are not offered to peers. Empty: all roads may be
  /// taken.
  std::vector<std::string> require;

  /// With a keyring, pages don't leave this host unencrypted: a road over which they would (RDMA, TCP with
  /// `Encryption::off`, a transport of your own that doesn't say otherwise) is an error of the constructor's. This allows
  /// it, for networks that nobody else is on, or that encrypt; `ChannelOptions::require_encryption` takes precedence. Without a
  /// keyring nothing is encrypted in any case.
  bool allow_unencrypted = false;

  /// A road that doesn't answer is given up after this time, or after its share of the attempt's if that is less, as long
  /// as there are others behind it.
  std::chrono::milliseconds road_timeout{2000};
};

/// Moves pages over the best transport that there is between two peers: one channel, one init url, and a road for
/// each peer.
///
/// **The choice.** When two peers connect, the handshake tells what each side has. The side that connects tries what
/// both have in its own order, and takes the first that gets through; one that doesn't answer has
/// `AutoOptions::road_timeout`. A road within a host (`AutoRoad::within_host`) is tried only if both sides are on one host. Each connection
/// has one road at a time, the same for both sides and for everything that they do; when it breaks, the next
/// operation connects anew and chooses anew. It doesn't change while it works: `disconnect` and connect to have it
/// chosen again.
///
/// **Nothing is silent.** `PeerInfo::path` has the road's own words, and why no better one was taken: "tcp
/// 10.0.0.1:40112 -> ...; not rdma: no rail is active". So has the event "path_chosen", a warning where there is such
/// a reason but that the peer is on another host; `ChannelStats::roads` counts them. A transport that this host doesn't have
/// is left out with the event "road_unavailable", a warning: its constructor threw ENODEV, EOPNOTSUPP, ENOSYS, ENETDOWN
/// or ENOMEM (memory that can't be registered); or `errc::not_supported` where a region is a dma-buf. Any other error of
/// it is the constructor's. `AutoOptions::require` says what is not to be done without.
///
/// **Nothing falls back from security.** With a keyring, no road leads off the host unencrypted unless
/// `AutoOptions::allow_unencrypted` says so. A road off the host that ends with `errc::authentication_failed` or
/// `errc::encryption_mismatch` ends the attempt: somebody on the path could cause these errors, and must not be able to
/// choose another road by them.
///
/// **The same promises.** It is one channel: one inbox for notifications, one incarnation, `fence` and `close` for
/// whatever road is or was taken. An old connection, of any road, is shut before the peer is welcomed on a new one.
/// `capabilities()` has what all roads have. The keyring (`ChannelOptions::keyring`) secures the handshake, which is
/// one for all roads.
///
/// Peers are other `AutoTransferChannel`s: with a channel of one transport, connecting ends with
/// `errc::transport_mismatch`.
///
/// A subclass that overrides `handle_init_side_msg` does as for `TcpTransferChannel`.
class KVFERRY_EXPORT AutoTransferChannel : public kit::TransferChannelKit {
 public:
  /// Makes the transports' channels, starts listening if there is a `peer_init_url`, and starts the I/O threads.
  /// @throws TransferError `errc::no_path` if this host has none of the roads that may be taken; EINVAL: two roads of
  ///   one name, a name that is none, too many roads, a road that makes no channel or one without the options that
  ///   it was given, a name in `require` that no road has, a road whose own options differ (see `road`), or which would
  ///   move pages off this host unencrypted in spite of a keyring; `errc::invalid_region`, `errc::invalid_url`, the errno of a bind that failed, `errc::timed_out` as for
  ///   `TcpTransferChannel`; and what the transports' constructors throw.
  explicit AutoTransferChannel(AutoOptions options);
  ~AutoTransferChannel() override;

  /// "shm" (within a host), then "tcp", each with its default options. To have RDMA between the two:
  /// @code
  /// options.roads = kvferry::AutoTransferChannel::default_roads();
  /// options.roads.insert(options.roads.begin() + 1,
  ///                      kvferry::road<kvferry::RdmaTransferChannel>("rdma", kvferry::RdmaOptions()));
  /// @endcode
  [[nodiscard]] static std::vector<AutoRoad> default_roads();

  /// "auto".
  [[nodiscard]] std::string_view transport() const noexcept override;
  /// What all roads have, those left out not counted.
  [[nodiscard]] Capabilities capabilities() const noexcept override;
  /// With the roads, and the paths of all of them, each behind its road's name: "tcp lane 0".
  [[nodiscard]] ChannelStats stats() const override;

 protected:
  [[nodiscard]] std::unique_ptr<kit::Dial> dial(const std::string& peer_id) override;
  [[nodiscard]] bool run_accept(const std::string& source, std::size_t bytes, std::function<void()> answer) override;
  [[nodiscard]] Bytes accept(std::shared_ptr<kit::LinkHost> host, const Bytes& remote_endpoint,
                             kit::Clock::time_point deadline, kit::LinkHandler on_link) override;
  [[nodiscard]] bool leaves_host_in_the_clear() const noexcept override;
  void stop_listening() override;
  void register_region(const LocalRegion& region) override;
  [[nodiscard]] std::function<void(std::uint32_t)> region_forgetter() override;

 private:
  class Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace kvferry

#endif  // KVFERRY_AUTO_TRANSFER_CHANNEL_HPP
