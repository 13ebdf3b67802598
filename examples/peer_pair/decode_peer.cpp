// SPDX-License-Identifier: Apache-2.0
//
// The decode side of the peer pair: takes one KV cache from prefill_peer into its pool. README.md tells the story.

#include <fmt/core.h>
#include <kvferry/error.hpp>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "batch_window.hpp"
#include "cache_batches.hpp"
#include "cache_content.hpp"
#include "decode_channel.hpp"
#include "exit_code.hpp"
#include "messages.hpp"
#include "options.hpp"
#include "paged_cache.hpp"
#include "peer_watch.hpp"
#include "progress.hpp"
#include "supervisor.hpp"
#include "transport.hpp"

namespace example {
namespace {

constexpr std::string_view program = "decode_peer";
constexpr std::uint64_t shuffle_seed = 2;

class Decode {
 public:
  Decode(const DecodeOptions& options, CacheOffer offer, CacheDesk& desk, kvferry::BaseTransferChannel& channel,
         Supervisor& supervisor)
      : options_(options),
        offer_(std::move(offer)),
        cache_(desk.cache()),
        desk_(desk),
        channel_(channel),
        supervisor_(supervisor),
        batches_(cache_, offer_.pages_per_batch) {}

  void run() {
    PeerWatch watch(channel_, prefill_id, supervisor_);
    if (offer_.mode == mode_write) {
      await_pages();
    } else if (offer_.mode == mode_read) {
      read_pages();
    } else {
      receive_pages();
    }

    const std::string arrived = verify_cache();
    watch.stand_down();
    send_verdict(arrived);
    channel_.close();

    if (arrived != offer_.checksum) {
      throw Failure(
          ExitCode::checksum_mismatch,
          fmt::format("checksum mismatch: XXH3-128 {} left prefill, {} arrived here", offer_.checksum, arrived));
    }
    fmt::print("{}: checksum XXH3-128 {}, the same at prefill\n", program, arrived);
    if (!options_.output.empty()) {
      save_file(cache_, options_.output, [this] { supervisor_.check(); });
      fmt::print("{}: wrote {} bytes to {}\n", program, cache_.bytes(), options_.output);
    }
  }

 private:
  /// Prefill writes; each batch's notification says that it is here.
  void await_pages() {
    desk_.wait_for_page_table(options_.connect_timeout);
    Progress progress(program, "getting", cache_);
    std::vector<bool> is_here(batches_.count());
    for (std::size_t missing = batches_.count(); missing > 0; --missing) {
      std::error_code ec;
      const auto notification = channel_.receive_notification(options_.timeout, ec);
      if (ec) {
        throw Failure(ExitCode::transfer_failed, fmt::format("{} of {} batches have not come from {}: {}", missing,
                                                             batches_.count(), prefill_id, ec.message()));
      }
      const auto batch = batch_named_by(notification);
      if (is_here[batch]) {
        throw Failure(ExitCode::transfer_failed,
                      fmt::format("{} wrote batch {} twice", notification.peer_id, batch + 1));
      }
      is_here[batch] = true;
      progress.advance(batches_.bytes(batch));
    }
    progress.finish(mode_write, path());
  }

  [[nodiscard]] std::size_t batch_named_by(const kvferry::Notification& notification) const {
    const auto* text = reinterpret_cast<const char*>(notification.payload.data());
    const auto* end = text + notification.payload.size();
    std::size_t batch = 0;
    const auto parsed = std::from_chars(text, end, batch);
    if (parsed.ec != std::errc{} || parsed.ptr != end || batch >= batches_.count()) {
      throw Failure(ExitCode::transfer_failed,
                    fmt::format("{} sent a notification of {} bytes that is not a batch's number below {}",
                                notification.peer_id, notification.payload.size(), batches_.count()));
    }
    return batch;
  }

  /// One-sided: prefill does nothing but wait for the notifications that the reads bring.
  void read_pages() {
    const auto prefill_indexes = desk_.wait_for_page_table(options_.connect_timeout);
    Progress progress(program, "reading", cache_);
    auto window = window_onto_prefill([&](std::size_t batch) { progress.advance(batches_.bytes(batch)); });
    window.run([&](std::size_t batch, kvferry::TransferSpec spec, auto handler) {
      const std::string notification = std::to_string(batch);
      spec.remote_indexes = batches_.part_of(prefill_indexes, batch);
      spec.notification = std::as_bytes(std::span(notification));
      channel_.async_batched_read(batches_.pages(batch), spec, std::move(handler));
    });
    progress.finish(mode_read, path());
  }

  /// Paired: prefill sends batch n with tag n, too.
  void receive_pages() {
    Progress progress(program, "receiving", cache_);
    auto window = window_onto_prefill([&](std::size_t batch) { progress.advance(batches_.bytes(batch)); });
    window.run([&](std::size_t batch, kvferry::TransferSpec spec, auto handler) {
      spec.tag = batch;
      channel_.async_batched_recv(batches_.pages(batch), spec, std::move(handler));
    });
    progress.finish(mode_sendrecv, path());
  }

  std::string verify_cache() {
    corrupt(cache_, options_.corrupt_byte);
    return checksum(cache_, [this] { supervisor_.check(); });
  }

  void send_verdict(const std::string& checksum) {
    kvferry::TransferSpec spec;
    spec.peer_id = prefill_id;
    spec.tag = tag_verdict;
    channel_.batched_send({std::as_bytes(std::span(checksum))}, spec);
  }

  [[nodiscard]] std::string path() const { return channel_.peer_info(prefill_id).value_or(kvferry::PeerInfo{}).path; }

  [[nodiscard]] BatchWindow window_onto_prefill(BatchWindow::Landed landed) const {
    return {std::string(prefill_id), batches_, options_.window_limits(), supervisor_, std::move(landed)};
  }

  const DecodeOptions& options_;
  CacheOffer offer_;
  const PagedCache& cache_;
  CacheDesk& desk_;
  kvferry::BaseTransferChannel& channel_;
  Supervisor& supervisor_;
  CacheBatches batches_;
};

kvferry::ChannelOptions channel_options(const DecodeOptions& options, const PagePool& pool) {
  auto channel = options.channel_options(pool.region());
  channel.peer_init_url = options.listen;
  channel.advertised_init_url = options.advertise;
  return channel;
}

std::unique_ptr<kvferry::BaseTransferChannel> listen(const DecodeOptions& options, const PagePool& pool,
                                                     CacheDesk& desk) {
  try {
    return make_channel<DecodeChannel>(options, channel_options(options, pool), desk);
  } catch (const kvferry::TransferError& error) {
    throw Failure(ExitCode::cannot_listen, error.what());
  }
}

void run(const DecodeOptions& options) {
  // Declared in the order of lifetimes: the memory outlives the channel, and the channel whoever may close it.
  PagePool pool(options.page_size, std::max<std::uint64_t>(1, pages_for(options.pool_bytes, options.page_size)),
                shuffle_seed);
  CacheDesk desk(pool);
  const auto channel = listen(options, pool, desk);
  Supervisor supervisor(*channel);
  fmt::print("{}: listening on {}\n", program, channel->peer_init_url());
  std::fflush(stdout);
  supervisor.supervise([&] {
    auto offer = desk.wait_for_offer(options.accept_timeout);
    Decode(options, std::move(offer), desk, *channel, supervisor).run();
  });
}

}  // namespace
}  // namespace example

int main(int argc, char** argv) {
  return example::run_program(example::program, [&] {
    if (const auto options = example::parse_decode_options(argc, argv)) {
      example::run(*options);
    }
  });
}
