// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/channel_options.hpp>
#include <kvferry/log.hpp>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "batch_window.hpp"
#include "kv_geometry.hpp"

namespace example {

/// The options of both peers.
struct CommonOptions {
  std::string transport = "tcp";
  KvGeometry geometry;
  std::uint64_t tokens = 1024;
  std::uint64_t dtype_bytes = 2;
  std::uint64_t page_size = 0;
  std::size_t depth = 4;
  std::size_t lanes = 1;        ///< tcp
  std::uint16_t data_port = 0;  ///< tcp
  std::uint64_t max_rate = 0;
  std::chrono::milliseconds timeout{30'000};          ///< For each batch, and for the verdict.
  std::chrono::milliseconds connect_timeout{30'000};  ///< For the handshake and each message of the agreement.
  std::string key_file;                               ///< Empty: handshakes are not secured.
  std::string peer_keys_file;
  std::optional<std::uint64_t> corrupt_byte;
  kvferry::LogLevel log_level = kvferry::LogLevel::warning;

  /// The size of a cache of so many tokens.
  [[nodiscard]] std::uint64_t cache_bytes() const noexcept { return tokens * geometry.bytes_per_token(dtype_bytes); }

  [[nodiscard]] BatchWindow::Limits window_limits() const noexcept { return {depth, timeout, max_rate}; }

  /// The same for a channel that offers one region. @throws kvferry::TransferError for keys that can't be read.
  [[nodiscard]] kvferry::ChannelOptions channel_options(const kvferry::MemoryRegion& region) const;
};

struct PrefillOptions : CommonOptions {
  std::string connect;
  std::string mode;
  std::string file;  ///< Empty: the content is generated.
  std::size_t pages_per_batch = 256;
};

struct DecodeOptions : CommonOptions {
  std::string listen = "127.0.0.1:0";
  std::string advertise;
  std::uint64_t pool_bytes = 0;
  std::string output;  ///< Empty: what arrived is not written to a file.
  std::chrono::milliseconds accept_timeout{300'000};
};

/// Parse the command line. No value: the user asked for help and has got it. @throws Failure for bad options.
[[nodiscard]] std::optional<PrefillOptions> parse_prefill_options(int argc, const char* const* argv);
[[nodiscard]] std::optional<DecodeOptions> parse_decode_options(int argc, const char* const* argv);

}  // namespace example
