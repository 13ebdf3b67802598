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
  /// The name that both sides use for it: 1 to 32 bytes of UTF-8 without control characters. `PeerInfo::path`, errors
  /// and `AutoOptions::require` use this name.
  std::string name;
  /// Makes the transport's channel. The constructor of `AutoTransferChannel` calls it, with the options that all
  /// channels have. Pass all of them on to the transport's constructor.
  std::function<std::unique_ptr<kit::TransferChannelKit>(ChannelOptions)> make;
  /// Whether the road leads to no other host. It is then tried only if both sides are on one host.
  bool within_host = false;
};

/// Compares the road's own options with those of the `AutoTransferChannel`, which replace them. `road` calls it.
/// @throws TransferError EINVAL if an option of the road's own would be lost.
KVFERRY_EXPORT void check_options_of_road(const std::string& name, const ChannelOptions& own,
                                          const ChannelOptions& common);

/// Makes a road over a transport, one of kvferry's or your own. Two roads may have the same transport, for example on
/// two networks; their names tell them apart.
/// @tparam Channel a subclass of `kit::TransferChannelKit`: `RdmaTransferChannel`.
/// @param options the transport's own. Its part that is a `ChannelOptions` is replaced by the `AutoTransferChannel`'s.
///   If an option of that part is set here, and differs there, the constructor throws EINVAL. A log sink that is set
///   here is an error only if there is none there.
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

  /// The names of the roads that may be taken. The other roads are not offered to peers. If none of these leads to the
  /// peer, connecting fails, and so do operations that have to connect anew: with `errc::no_path`, or with the error of
  /// a road that was tried, if that is `errc::timed_out` (it didn't answer), `errc::resource_limit`, or one that trying
  /// again doesn't mend (`errc::handshake_failed`, `errc::malformed_message`, `errc::protocol_violation`,
  /// `errc::authentication_failed`, `errc::encryption_mismatch`, or a code of kvferry's by a transport of your own).
  /// Empty: all roads may be taken.
  std::vector<std::string> require;

  /// Allows roads that send pages in the clear although there is a keyring. With a keyring and without this option, the
  /// constructor throws if there is a road that sends pages unencrypted off this host (RDMA, TCP with
  /// `Encryption::off`, a transport of your own that doesn't say otherwise). Set it for networks that nobody else uses,
  /// or that encrypt. `ChannelOptions::require_encryption` takes precedence. Without a keyring nothing is encrypted in
  /// any case.
  bool allow_unencrypted = false;

  /// How long a road may take to answer before the next one is tried. If its share of the attempt's time is less, that
  /// counts. The last road has all of the remaining time: if it doesn't answer either, the call ends by its own
  /// deadline, and its error names the road and says why those before it were not taken. Set it alike on both sides: a
  /// fence of either waits for so long for a road that doesn't answer, if there are others behind it.
  std::chrono::milliseconds road_timeout{2000};
};

/// Moves pages over the best transport between two peers: one channel, one init url, and a road for each peer. A road
/// is one of the channel's transports with its options.
///
/// **The choice.** When two peers connect, the handshake tells each side's roads. The side that connects tries the
/// roads that both have, in its own order, and takes the first that works. A road that doesn't answer is given up after
/// `AutoOptions::road_timeout`. A road within a host (`AutoRoad::within_host`) is tried only if both sides are on one
/// host. Each connection has one road, the same for both sides and for all operations. When it breaks, the next
/// operation connects anew and chooses anew. A road that works is kept; `disconnect` and connect to choose again.
///
/// **Nothing is silent.** `PeerInfo::path` describes the road and gives the reason why no better one was taken: "tcp
/// 10.0.0.1:40112 -> ...; not rdma: no rail is active". So does the log event "path_chosen". It is a warning if there
/// is such a reason, other than that the peer is on another host. Each side's own order decides which road is better: the
/// side that didn't connect may read "not rdma: the peer prefers tcp". `ChannelStats::roads` counts the connections
/// over each road. A transport that this host doesn't have is left out, with the warning "road_unavailable": its constructor
/// threw ENODEV, EOPNOTSUPP, ENOSYS, ENETDOWN or ENOMEM (memory that can't be registered), or `errc::not_supported` if
/// a region is a dma-buf. Any other error of a transport's constructor is thrown. `AutoOptions::require` names the
/// roads to which the channel is restricted.
///
/// **Nothing falls back from security.** With a keyring, no road leads off the host unencrypted unless
/// `AutoOptions::allow_unencrypted` allows it. If a road off the host ends with `errc::authentication_failed` or
/// `errc::encryption_mismatch`, the attempt ends and no other road is tried: an attacker on the path could cause these
/// errors, and must not be able to choose the road by them.
///
/// **The same promises.** It is one channel: it has one inbox for notifications and one incarnation, and `fence` and
/// `close` hold for all roads. An old connection, over any road, is shut before the peer is accepted on a new one.
/// `capabilities()` has the capabilities that all roads have. The keyring (`ChannelOptions::keyring`) secures the
/// handshake, which all roads share.
///
/// Peers are other `AutoTransferChannel`s: with a channel of one transport, connecting ends with
/// `errc::transport_mismatch`.
///
/// A subclass that overrides `handle_init_side_msg` follows the rule at `TcpTransferChannel`.
class KVFERRY_EXPORT AutoTransferChannel : public kit::TransferChannelKit {
 public:
  /// Makes the transports' channels, starts listening if there is a `peer_init_url`, and starts the I/O threads.
  /// @throws TransferError `errc::no_path` if this host has none of the roads that may be taken; EINVAL for two roads
  ///   of one name, an invalid name, too many roads, a road that makes no channel or one without the options that it
  ///   was given, a name in `require` that no road has, a road whose own options differ (see `road`), or a road that
  ///   would send pages off this host unencrypted although there is a keyring; `errc::invalid_region`,
  ///   `errc::invalid_url`, the errno of a bind that failed, `errc::timed_out` as for `TcpTransferChannel`; and the
  ///   errors of the transports' constructors.
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
  /// The capabilities that all roads have. Roads that were left out don't count.
  [[nodiscard]] Capabilities capabilities() const noexcept override;
  /// Includes the roads, and the paths of all roads, each with its road's name in front: "tcp lane 0".
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
