// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/channel_stats.hpp>

#include <algorithm>
#include <string_view>
#include <utility>

#include <kvferry/error.hpp>

namespace kvferry::inline KVFERRY_ABI {
inline namespace internal {

using Labels = std::vector<std::pair<std::string_view, std::string>>;

inline constexpr std::array<std::string_view, 10> own_labels{"transport", "kind", "category", "cause",   "path",
                                                             "direction", "le",   "peer",     "outcome", "road"};

KVFERRY_INLINE bool is_label_name(std::string_view name) {
  const auto is_letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; };
  return !name.empty() && is_letter(name.front()) && !name.starts_with("__") &&
         std::ranges::all_of(name, [&](char c) { return is_letter(c) || (c >= '0' && c <= '9'); });
}

KVFERRY_INLINE void check_labels(const ChannelStats& channel) {
  for (const auto& [name, value] : channel.labels) {
    if (!is_label_name(name) || std::ranges::find(own_labels, name) != own_labels.end()) {
      throw TransferError(
          std::make_error_code(std::errc::invalid_argument),
          "label '" + name + "' = '" + value +
              "': " + (is_label_name(name) ? "kvferry uses this name itself" : "not a name of a Prometheus label"));
    }
  }
}

KVFERRY_INLINE std::string escaped(std::string_view value) {
  std::string result;
  for (const char c : value) {
    if (c == '\n') {
      result += "\\n";
      continue;
    }
    if (c == '\\' || c == '"') {
      result += '\\';
    }
    result += c;
  }
  return result;
}

/// Without the locale's decimal comma.
KVFERRY_INLINE std::string in_seconds(std::chrono::nanoseconds duration) {
  std::string digits = std::to_string(duration.count());
  if (digits.size() < 10) {
    digits.insert(0, 10 - digits.size(), '0');
  }
  digits.insert(digits.size() - 9, 1, '.');
  return digits;
}

/// The samples of all channels, one metric after the other, as the format wants them.
class Exposition {
 public:
  explicit Exposition(std::span<const ChannelStats> channels) : channels_(channels) {}

  /// @param add_samples called for each channel.
  template <class AddSamples>
  void metric(std::string_view name, std::string_view type, std::string_view help, AddSamples add_samples) {
    name_ = name;
    text_ += "# HELP " + name_ + " " + std::string(help) + "\n# TYPE " + name_ + " " + std::string(type) + "\n";
    for (const ChannelStats& channel : channels_) {
      channel_ = &channel;
      add_samples(channel);
    }
  }

  /// As above, with samples for each kind of transfer.
  template <class AddSamples>
  void metric_of_transfers(std::string_view name, std::string_view type, std::string_view help,
                           AddSamples add_samples) {
    metric(name, type, help, [&](const ChannelStats& channel) {
      for (std::size_t i = 0; i < channel.transfers.size(); ++i) {
        add_samples(channel.transfers[i], std::string(to_string(static_cast<TransferKind>(i))));
      }
    });
  }

  /// As above, with one number for each kind.
  void value_of_transfers(std::string_view name, std::string_view type, std::string_view help,
                          std::uint64_t (*value)(const TransferStats&)) {
    metric_of_transfers(name, type, help, [&](const TransferStats& transfers, const std::string& kind) {
      sample({{"kind", kind}}, std::to_string(value(transfers)));
    });
  }

  void sample(const Labels& labels, const std::string& value, std::string_view suffix = {}) {
    text_ += name_;
    text_ += suffix;
    text_ += "{transport=\"" + escaped(channel_->transport) + "\"";
    for (const auto& [name, text] : channel_->labels) {
      add_label(name, text);
    }
    for (const auto& [name, text] : labels) {
      add_label(name, text);
    }
    text_ += "} " + value + "\n";
  }

  void histogram(const std::string& kind, const LatencyHistogram& histogram) {
    std::uint64_t up_to_here = 0;
    for (std::size_t i = 0; i < LatencyHistogram::bucket_count; ++i) {
      up_to_here += histogram.counts[i];
      const bool last = i + 1 == LatencyHistogram::bucket_count;
      sample({{"kind", kind}, {"le", last ? "+Inf" : in_seconds(LatencyHistogram::upper_bound(i))}},
             std::to_string(up_to_here), "_bucket");
    }
    sample({{"kind", kind}}, in_seconds(histogram.sum), "_sum");
    sample({{"kind", kind}}, std::to_string(up_to_here), "_count");
  }

  [[nodiscard]] std::string take() { return std::move(text_); }

 private:
  void add_label(std::string_view name, std::string_view value) {
    text_ += ',';
    text_ += name;
    text_ += "=\"" + escaped(value) + "\"";
  }

  const std::span<const ChannelStats> channels_;
  const ChannelStats* channel_ = nullptr;
  std::string name_;
  std::string text_;
};

}  // namespace internal

KVFERRY_INLINE std::string to_prometheus(std::span<const ChannelStats> channels) {
  std::ranges::for_each(channels, check_labels);
  Exposition text(channels);
  text.metric("kvferry_connected_peers", "gauge", "Peers with a usable connection.",
              [&](const ChannelStats& channel) { text.sample({}, std::to_string(channel.connected_peers)); });
  text.metric("kvferry_identity_conflicts_total", "counter",
              "Connects that were refused because another channel that lives has the same id.",
              [&](const ChannelStats& channel) { text.sample({}, std::to_string(channel.identity_conflicts)); });
  text.metric("kvferry_peer_replacements_total", "counter", "Known peers in whose place somebody else was found.",
              [&](const ChannelStats& channel) { text.sample({}, std::to_string(channel.peer_replacements)); });
  text.metric("kvferry_checksum_mismatches_total", "counter",
              "Objects that landed here with other bytes than were sent.",
              [&](const ChannelStats& channel) { text.sample({}, std::to_string(channel.checksum_mismatches)); });
  text.metric(
      "kvferry_handshakes_total", "counter", "Connections made and attempts that came to nothing, by who asked.",
      [&](const ChannelStats& channel) {
        const HandshakeStats& handshakes = channel.handshakes;
        const auto add = [&](std::string_view direction, std::uint64_t made, const std::vector<CauseCount>& failed) {
          text.sample({{"direction", std::string(direction)}, {"category", ""}, {"cause", ""}}, std::to_string(made));
          for (const auto& [cause, count] : failed) {
            text.sample({{"direction", std::string(direction)},
                         {"category", cause.category().name()},
                         {"cause", error_name(cause)}},
                        std::to_string(count));
          }
        };
        add("out", handshakes.dialed, handshakes.failed);
        add("in", handshakes.accepted, handshakes.refused);
      });
  text.metric(
      "kvferry_refused_strangers_total", "counter",
      "Connections and messages that were turned away before anybody knew whose they were, by cause.",
      [&](const ChannelStats& channel) {
        for (const auto& [cause, count] : channel.refused_strangers) {
          text.sample({{"category", cause.category().name()}, {"cause", error_name(cause)}}, std::to_string(count));
        }
      });
  text.metric("kvferry_reconnects_total", "counter", "Connections to peers that had been connected before.",
              [&](const ChannelStats& channel) { text.sample({}, std::to_string(channel.handshakes.reconnected)); });
  text.metric("kvferry_pending_notifications", "gauge", "Notifications that nobody has received yet.",
              [&](const ChannelStats& channel) { text.sample({}, std::to_string(channel.pending_notifications)); });
  text.metric("kvferry_peer_connected", "gauge", "Whether there is a usable connection to a known peer.",
              [&](const ChannelStats& channel) {
                for (const PeerStats& peer : channel.peers) {
                  text.sample({{"peer", peer.id}}, peer.connected ? "1" : "0");
                }
              });
  text.metric("kvferry_peer_operations_total", "counter", "Operations with a peer that ended.",
              [&](const ChannelStats& channel) {
                for (const PeerStats& peer : channel.peers) {
                  text.sample({{"peer", peer.id}, {"outcome", "succeeded"}}, std::to_string(peer.succeeded));
                  text.sample({{"peer", peer.id}, {"outcome", "failed"}}, std::to_string(peer.failed));
                }
              });
  text.metric("kvferry_peer_bytes_total", "counter", "Bytes of the objects that were transferred with a peer.",
              [&](const ChannelStats& channel) {
                for (const PeerStats& peer : channel.peers) {
                  text.sample({{"peer", peer.id}}, std::to_string(peer.bytes));
                }
              });
  text.value_of_transfers("kvferry_operations_started_total", "counter", "Operations that were called for.",
                          [](const TransferStats& transfers) { return transfers.started; });
  text.value_of_transfers("kvferry_operations_succeeded_total", "counter", "Operations that ended well.",
                          [](const TransferStats& transfers) { return transfers.succeeded; });
  text.metric_of_transfers(
      "kvferry_operations_failed_total", "counter", "Operations that ended with an error, by cause.",
      [&](const TransferStats& transfers, const std::string& kind) {
        for (const auto& [cause, operations] : transfers.failures) {
          text.sample({{"kind", kind}, {"category", cause.category().name()}, {"cause", error_name(cause)}},
                      std::to_string(operations));
        }
      });
  text.value_of_transfers("kvferry_operations_in_flight", "gauge", "Operations that have not ended.",
                          [](const TransferStats& transfers) { return transfers.in_flight(); });
  text.value_of_transfers("kvferry_objects_total", "counter", "Objects that were transferred.",
                          [](const TransferStats& transfers) { return transfers.objects; });
  text.value_of_transfers("kvferry_object_bytes_total", "counter", "Bytes of the objects that were transferred.",
                          [](const TransferStats& transfers) { return transfers.bytes; });
  text.metric_of_transfers(
      "kvferry_operation_duration_seconds", "histogram", "From the call to the end, of operations that ended well.",
      [&](const TransferStats& transfers, const std::string& kind) { text.histogram(kind, transfers.latency); });
  text.metric("kvferry_path_bytes_total", "counter", "Bytes that this side moved over a lane or rail.",
              [&](const ChannelStats& channel) {
                for (const PathStats& path : channel.paths) {
                  text.sample({{"path", path.name}, {"direction", "out"}}, std::to_string(path.bytes_out));
                  text.sample({{"path", path.name}, {"direction", "in"}}, std::to_string(path.bytes_in));
                }
              });
  text.metric("kvferry_road_connections_total", "counter", "Connections over a transport, of a channel with several.",
              [&](const ChannelStats& channel) {
                for (const RoadStats& road : channel.roads) {
                  text.sample({{"road", road.name}}, std::to_string(road.taken));
                }
              });
  text.metric("kvferry_road_fallbacks_total", "counter", "How many of them for want of a better transport.",
              [&](const ChannelStats& channel) {
                for (const RoadStats& road : channel.roads) {
                  text.sample({{"road", road.name}}, std::to_string(road.fallbacks));
                }
              });
  return text.take();
}

KVFERRY_INLINE std::string to_prometheus(const ChannelStats& channel) { return to_prometheus(std::span(&channel, 1)); }

}  // namespace kvferry
