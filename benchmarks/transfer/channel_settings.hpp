// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/base_transfer_channel.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "common/job.hpp"
#include "common/result.hpp"

namespace bench {

/// How the channels of a job are made and used. Settings that are not given have the library's defaults.
struct ChannelSettings {
  std::string transport = "tcp";
  bool async = false;
  std::string poll;             ///< never, adaptive, always; empty: the default.
  std::uint64_t spin_us = 0;    ///< Of adaptive polling; 0: 50.
  std::size_t lanes = 0;        ///< 0: the default.
  std::size_t queue_pairs = 0;  ///< Of each of rdma's rails; 0: the default.
  std::size_t io_threads = 0;   ///< 0: the default.
  std::size_t send_buffer = 0;  ///< 0: the default.
  std::size_t receive_buffer = 0;
  std::string congestion;  ///< TCP's; empty: the system's.
  std::string key;         ///< The secret key of both sides, made for the run; empty: none, and nothing is encrypted.
  bool checksums = false;  ///< Of all objects.
  bool unregistered = false;       ///< The initiator's objects lie outside of every region.
  std::size_t receives_ahead = 0;  ///< sendrecv: batches that the target has posted, for each stream.
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(ChannelSettings, transport, async, poll, spin_us, lanes, queue_pairs, io_threads,
                                   send_buffer, receive_buffer, congestion, key, checksums, unregistered,
                                   receives_ahead)

/// @param init_host where to listen; empty: not at all.
[[nodiscard]] std::unique_ptr<kvferry::BaseTransferChannel> make_channel(const ChannelSettings& settings,
                                                                         const kvferry::MemoryRegion& region,
                                                                         const std::string& init_host);

/// Of an RDMA channel, all rails together.
[[nodiscard]] std::optional<Window> window_of(const kvferry::BaseTransferChannel& channel);

/// The transports that were built.
[[nodiscard]] std::vector<std::string> transports();

}  // namespace bench
