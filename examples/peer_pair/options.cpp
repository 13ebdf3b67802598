// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <fmt/core.h>
#include <kvferry/keyring.hpp>
#include <kvferry/url.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <string_view>
#include <system_error>
#include <vector>

#include "exit_code.hpp"
#include "logging.hpp"
#include "messages.hpp"

namespace example {
namespace {

/// Arguments that have another form on the command line than in the options.
struct RawOptions {
  std::string model = "llama-3.1-8b";
  double timeout_seconds = 30;
  std::optional<double> connect_timeout_seconds;
  double accept_timeout_seconds = 300;
  std::string log_level = "warning";
};

/// The largest values that make sense; nothing that is computed from them overflows.
constexpr std::uint64_t max_tokens = std::uint64_t{1} << 24;
constexpr std::uint64_t max_page_size = std::uint64_t{1} << 30;
constexpr std::uint64_t max_bytes = std::uint64_t{1} << 46;

std::string geometry_help() {
  std::string help =
      "Size of a KV cache:\n"
      "  grouped-query attention  2 (K and V) x num_hidden_layers x num_key_value_heads x head_dim\n"
      "                           x dtype-bytes, for each token\n"
      "  latent attention (MLA)   num_hidden_layers x (kv_lora_rank + qk_rope_head_dim) x dtype-bytes,\n"
      "                           for each token\n"
      "The numbers are those of each model's published config.json:\n";
  for (const auto& model : known_models) {
    help += fmt::format(
        "  {:<14} {} = {} bytes a token at 2 bytes a number\n", model.model,
        model.is_latent()
            ? fmt::format("{} x ({} + {}) x 2", model.num_hidden_layers, model.kv_lora_rank, model.qk_rope_head_dim)
            : fmt::format("2 x {} x {} x {} x 2", model.num_hidden_layers, model.num_key_value_heads, model.head_dim),
        model.bytes_per_token(2));
  }
  return help + fmt::format(
                    "A page is one block of {} tokens of one layer, as servers with paged attention have them, unless\n"
                    "--page-size says otherwise. The cache is cut into such pages; the last one may be partly used.\n",
                    KvGeometry::tokens_per_block);
}

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(std::llround(seconds * 1000));
}

// CLI11's validators, without their descriptions in the list of options.

template <class T>
CLI::Validator between(T smallest, T largest) {
  return CLI::Range(smallest, largest).description("");
}

CLI::Validator one_of(const std::vector<std::string>& values) { return CLI::IsMember(values).description(""); }

CLI::Validator size_with_unit() { return CLI::AsSizeValue(false).description(""); }

#ifdef KVFERRY_EXAMPLES_WITH_RDMA
constexpr std::string_view transports = "tcp, rdma, or auto: the best that both sides have";
#else
constexpr std::string_view transports = "tcp, or auto: the best that both sides have; not rdma, for kvferry::rdma was not built";
#endif

std::string check_transport(const std::string& name) {
#ifdef KVFERRY_EXAMPLES_WITH_RDMA
  const bool known = name == "tcp" || name == "auto" || name == "rdma";
#else
  const bool known = name == "tcp" || name == "auto";
#endif
  return known ? "" : fmt::format("'{}' is not available, this program moves pages over {}", name, transports);
}

std::string check_model(const std::string& name) {
  if (find_model(name) != nullptr) {
    return "";
  }
  std::string known;
  for (const auto& model : known_models) {
    known += (known.empty() ? "" : ", ") + std::string(model.model);
  }
  return fmt::format("'{}' is not one of {}", name, known);
}

constexpr std::array log_levels{kvferry::LogLevel::debug, kvferry::LogLevel::info, kvferry::LogLevel::warning,
                                kvferry::LogLevel::error, kvferry::LogLevel::off};

const kvferry::LogLevel* find_log_level(std::string_view name) {
  const auto* const found =
      std::ranges::find(log_levels, name, [](kvferry::LogLevel level) { return kvferry::to_string(level); });
  return found == log_levels.end() ? nullptr : found;
}

std::string check_log_level(const std::string& name) {
  return find_log_level(name) != nullptr ? "" : fmt::format("'{}' is not debug, info, warning, error or off", name);
}

std::string check_url(const std::string& url) {
  std::error_code ec;
  static_cast<void>(kvferry::parse_url(url, ec));
  return ec ? fmt::format("'{}' is not host:port", url) : "";
}

void add_common_options(CLI::App& app, CommonOptions& options, RawOptions& raw) {
  app.add_option("--transport", options.transport, fmt::format("What carries the pages: {}", transports))
      ->type_name("NAME")
      ->capture_default_str()
      ->check(check_transport);
  app.add_option("--model", raw.model, "The model whose KV cache it is; see below")
      ->type_name("NAME")
      ->capture_default_str()
      ->check(check_model);
  app.add_option("--tokens", options.tokens, "How many tokens are cached")
      ->type_name("N")
      ->capture_default_str()
      ->check(between(std::uint64_t{1}, max_tokens));
  app.add_option("--dtype-bytes", options.dtype_bytes, "Bytes of one number: 2 for bf16 and fp16, 1 for fp8")
      ->type_name("N")
      ->capture_default_str()
      ->check(between(std::uint64_t{1}, std::uint64_t{8}));
  app.add_option("--page-size", options.page_size,
                 "Bytes of a page, the same at both peers (4096, 64K, 1M, ...; default: one block of the model)")
      ->type_name("SIZE")
      ->transform(size_with_unit())
      ->check(between(std::uint64_t{1}, max_page_size));
  app.add_option("--depth", options.depth, "How many batches this peer keeps in flight")
      ->type_name("N")
      ->capture_default_str()
      ->check(between(std::size_t{1}, std::size_t{1024}));
  app.add_option("--lanes", options.lanes, "tcp: connections for the pages; the smaller number of both peers counts")
      ->type_name("N")
      ->capture_default_str()
      ->check(between(std::size_t{1}, std::size_t{64}));
  app.add_option("--max-rate", options.max_rate,
                 "Bytes a second at most that this peer starts to transfer (default: no limit)")
      ->type_name("SIZE")
      ->transform(size_with_unit())
      ->check(between(std::uint64_t{1}, max_bytes));
  app.add_option("--timeout", raw.timeout_seconds,
                 "Seconds that the peer may take for each step: the handshake, a batch, the verdict")
      ->type_name("SECONDS")
      ->capture_default_str()
      ->check(between(0.001, 86'400.0));
  app.add_option("--connect-timeout", raw.connect_timeout_seconds,
                 "The same for the handshake and what follows before the first batch (default: --timeout)")
      ->type_name("SECONDS")
      ->check(between(0.001, 86'400.0));
  auto* const key =
      app.add_option("--key", options.key_file, "This peer's secret key, from kvferry-keygen: encrypts all that goes over TCP")
          ->type_name("FILE");
  app.add_option("--peer-keys", options.peer_keys_file,
                 "The public keys that are trusted, as kvferry-keygen prints them")
      ->type_name("FILE")
      ->needs(key);
  key->needs("--peer-keys");
  app.add_option("--corrupt-byte", options.corrupt_byte,
                 "Fault injection for tests: flips this byte of the cache behind the checksum's back")
      ->type_name("OFFSET");
  app.add_option("--log", raw.log_level, "What kvferry logs, to stderr: debug, info, warning, error or off")
      ->type_name("LEVEL")
      ->capture_default_str()
      ->check(check_log_level);
  app.get_formatter()->column_width(34);
}

/// Parses, and fills in what follows from the rest. False: help was asked for and given.
bool parse(CLI::App& app, int argc, const char* const* argv, CommonOptions& options, const RawOptions& raw) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& success) {
    app.exit(success);
    return false;
  } catch (const CLI::ParseError& error) {
    throw Failure(ExitCode::bad_options, fmt::format("{} (--help explains the options)", error.what()));
  }
  options.geometry = *find_model(raw.model);
  if (options.page_size == 0) {
    options.page_size = options.geometry.bytes_per_block(options.dtype_bytes);
  }
  options.log_level = *find_log_level(raw.log_level);
  options.timeout = milliseconds(raw.timeout_seconds);
  options.connect_timeout = milliseconds(raw.connect_timeout_seconds.value_or(raw.timeout_seconds));
  return true;
}

}  // namespace

kvferry::ChannelOptions CommonOptions::channel_options(const kvferry::MemoryRegion& region) const {
  kvferry::ChannelOptions channel;
  channel.regions = {region};
  channel.default_timeout = timeout;
  channel.handshake_timeout = connect_timeout;
  channel.log_sink = log_to_spdlog();
  channel.log_level = log_level;
  if (!key_file.empty()) {
    channel.keyring =
        std::make_shared<kvferry::Keyring>(kvferry::read_key_pair(key_file), kvferry::read_peer_keys(peer_keys_file));
  }
  return channel;
}

std::optional<PrefillOptions> parse_prefill_options(int argc, const char* const* argv) {
  PrefillOptions options;
  RawOptions raw;
  CLI::App app("Has a KV cache and moves it to a decode peer. Start decode_peer first; it says where it listens.");
  app.add_option("--connect", options.connect, "Where decode_peer listens")
      ->type_name("HOST:PORT")
      ->required()
      ->check(check_url);
  options.mode = mode_write;
  app.add_option("--mode", options.mode,
                 "write: this peer writes into decode's pages; read: decode reads this peer's pages; "
                 "sendrecv: this peer sends and decode receives, paired by tag")
      ->type_name("MODE")
      ->capture_default_str()
      ->check(one_of({std::string(mode_write), std::string(mode_read), std::string(mode_sendrecv)}));
  app.add_option("--file", options.file, "Move this file's bytes instead of generated ones; any size")
      ->type_name("PATH");
  app.add_option("--batch", options.pages_per_batch, "Pages in a batch")
      ->type_name("N")
      ->capture_default_str()
      ->check(between(std::size_t{1}, std::size_t{1} << 20));
  add_common_options(app, options, raw);
  app.footer(fmt::format("\n{}\n{}", geometry_help(), exit_code_help));
  if (!parse(app, argc, argv, options, raw)) {
    return std::nullopt;
  }
  return options;
}

std::optional<DecodeOptions> parse_decode_options(int argc, const char* const* argv) {
  DecodeOptions options;
  RawOptions raw;
  CLI::App app("Has a pool of pages and takes one KV cache from a prefill peer into it.");
  app.add_option("--listen", options.listen, "Where to listen; port 0: any free one, which is printed")
      ->type_name("HOST:PORT")
      ->capture_default_str()
      ->check(check_url);
  app.add_option("--advertise", options.advertise,
                 "What prefill is told instead of the address listened at (NAT, a wildcard address)")
      ->type_name("HOST:PORT")
      ->check(check_url);
  app.add_option("--data-port", options.data_port, "tcp: the port that the pages come in at; 0: any free one")
      ->type_name("PORT")
      ->capture_default_str();
  app.add_option("--pool-size", options.pool_bytes,
                 "Bytes of memory for pages (64M, 2G, ...; default: what a cache of --tokens takes)")
      ->type_name("SIZE")
      ->transform(size_with_unit())
      ->check(between(std::uint64_t{0}, max_bytes));
  app.add_option("--output", options.output, "Write what arrived to this file")->type_name("PATH");
  app.add_option("--accept-timeout", raw.accept_timeout_seconds, "Seconds to wait for a prefill peer")
      ->type_name("SECONDS")
      ->capture_default_str()
      ->check(between(0.001, 864'000.0));
  add_common_options(app, options, raw);
  app.footer(fmt::format("\n{}\n{}", geometry_help(), exit_code_help));
  if (!parse(app, argc, argv, options, raw)) {
    return std::nullopt;
  }
  options.accept_timeout = milliseconds(raw.accept_timeout_seconds);
  if (options.pool_bytes == 0) {
    options.pool_bytes = options.cache_bytes();
  }
  return options;
}

}  // namespace example
