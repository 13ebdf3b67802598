// SPDX-License-Identifier: Apache-2.0
//
// The prefill side of the peer pair: has a KV cache and moves it to decode_peer. README.md tells the story.

#include <fmt/core.h>
#include <kvferry/side_message_codec.hpp>

#include <algorithm>
#include <cstdio>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "batch_window.hpp"
#include "cache_batches.hpp"
#include "cache_content.hpp"
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

constexpr std::string_view program = "prefill_peer";
constexpr std::uint64_t shuffle_seed = 1;

class Prefill {
 public:
  Prefill(const PrefillOptions& options, const PagedCache& cache, kvferry::BaseTransferChannel& channel,
          Supervisor& supervisor)
      : options_(options),
        cache_(cache),
        channel_(channel),
        supervisor_(supervisor),
        batches_(cache, options.pages_per_batch) {}

  void run() {
    const std::string checksum = fill_cache();
    offer_cache(checksum);
    PeerWatch watch(channel_, decode_id, supervisor_);

    if (options_.mode == mode_write) {
      write_pages();
    } else if (options_.mode == mode_read) {
      lend_pages();
    } else {
      send_pages();
    }

    watch.stand_down();
    const std::string arrived = receive_verdict();
    // The side that sent last closes first: then no last acknowledgement is lost.
    watch.wait_until_gone(options_.timeout);
    if (arrived != checksum) {
      throw Failure(ExitCode::checksum_mismatch,
                    fmt::format("checksum mismatch: XXH3-128 {} left here, {} arrived at decode", checksum, arrived));
    }
    fmt::print("{}: checksum XXH3-128 {}, the same at decode\n", program, checksum);
  }

 private:
  /// Does the prefill's work, so to speak. Returns the checksum.
  std::string fill_cache() {
    const auto checkpoint = [this] { supervisor_.check(); };
    if (options_.file.empty()) {
      generate_content(cache_, checkpoint);
    } else {
      load_file(cache_, options_.file, checkpoint);
    }
    auto sum = checksum(cache_, checkpoint);
    corrupt(cache_, options_.corrupt_byte);
    return sum;
  }

  /// Connects to decode and tells it what is coming.
  void offer_cache(const std::string& checksum) {
    fmt::print("{}: connecting to {}\n", program, options_.connect);
    std::fflush(stdout);
    const CacheOffer offer{options_.mode, cache_.bytes(), options_.page_size, options_.pages_per_batch, checksum};
    try {
      channel_.lazy_init_peer_connection(prefill_id, decode_id, options_.connect, kvferry::encode_side_message(offer));
    } catch (const kvferry::TransferError& error) {
      throw Failure(ExitCode::no_agreement, error.what());
    }
  }

  /// Each side tells the other where its pages lie. Returns decode's page table.
  std::vector<std::uint64_t> exchange_page_tables() {
    const auto own = cache_.indexes();
    std::vector<std::uint64_t> theirs;
    while (theirs.size() < own.size()) {
      const auto first = theirs.size();
      const auto part = own.subspan(first, std::min(own.size() - first, PageTablePart::max_indexes));
      const auto answer = exchange(PageTablePart{first, {part.begin(), part.end()}});
      if (answer.first != first || answer.indexes.size() != part.size()) {
        throw Failure(ExitCode::transfer_failed,
                      fmt::format("{} answered with {} pages from page {} of its page table, not {} from page {}",
                                  decode_id, answer.indexes.size(), answer.first, part.size(), first));
      }
      theirs.insert(theirs.end(), answer.indexes.begin(), answer.indexes.end());
    }
    return theirs;
  }

  PageTablePart exchange(const PageTablePart& part) {
    try {
      return kvferry::decode_side_message<PageTablePart>(
          channel_.send_init_side_msg(options_.connect, kvferry::encode_side_message(part)));
    } catch (const kvferry::TransferError& error) {
      throw Failure(ExitCode::transfer_failed, fmt::format("no page table from {}: {}", decode_id, error.what()));
    }
  }

  /// One-sided: decode does nothing but wait for the notifications.
  void write_pages() {
    const auto decode_indexes = exchange_page_tables();
    Progress progress(program, "writing", cache_);
    window_onto_decode(progress).run([&](std::size_t batch, kvferry::TransferSpec spec, auto handler) {
      const std::string notification = std::to_string(batch);
      spec.remote_indexes = batches_.part_of(decode_indexes, batch);
      spec.notification = std::as_bytes(std::span(notification));
      channel_.async_batched_write(batches_.pages(batch), spec, std::move(handler));
    });
    progress.finish(mode_write, path());
  }

  /// One-sided, from the other side: decode reads, and each read notifies when its bytes are there. A server would then
  /// reuse the pages.
  void lend_pages() {
    // Decode starts to read when it has the page table: so the clock starts before.
    const auto started = Progress::Clock::now();
    exchange_page_tables();
    Progress progress(program, "lending", cache_, started);
    for (std::size_t batch = 0; batch < batches_.count(); ++batch) {
      channel_.receive_notification(options_.timeout);
      progress.advance(batches_.bytes(batch));
    }
    progress.finish(mode_read, path());
  }

  /// Paired: decode receives batch n with tag n, too.
  void send_pages() {
    Progress progress(program, "sending", cache_);
    window_onto_decode(progress).run([&](std::size_t batch, kvferry::TransferSpec spec, auto handler) {
      spec.tag = batch;
      channel_.async_batched_send(batches_.pages(batch), spec, std::move(handler));
    });
    progress.finish(mode_sendrecv, path());
  }

  /// The checksum of what decode has now.
  std::string receive_verdict() {
    std::string verdict(checksum_digits, '?');
    kvferry::TransferSpec spec;
    spec.peer_id = decode_id;
    spec.tag = tag_verdict;
    channel_.batched_recv({std::as_writable_bytes(std::span(verdict))}, spec);
    return verdict;
  }

  [[nodiscard]] std::string path() const { return channel_.peer_info(decode_id).value_or(kvferry::PeerInfo{}).path; }

  [[nodiscard]] BatchWindow window_onto_decode(Progress& progress) const {
    return {std::string(decode_id), batches_, options_.window_limits(), supervisor_,
            [this, &progress](std::size_t batch) { progress.advance(batches_.bytes(batch)); }};
  }

  const PrefillOptions& options_;
  const PagedCache& cache_;
  kvferry::BaseTransferChannel& channel_;
  Supervisor& supervisor_;
  CacheBatches batches_;
};

void run(const PrefillOptions& options) {
  const auto bytes = options.file.empty() ? options.cache_bytes() : file_size(options.file);
  // Declared in the order of lifetimes: the memory outlives the channel, and the channel whoever may close it.
  PagePool pool(options.page_size, std::max<std::uint64_t>(1, pages_for(bytes, options.page_size)), shuffle_seed);
  const PagedCache cache(pool, bytes);
  const auto channel = make_channel(options, options.channel_options(pool.region()));
  Supervisor supervisor(*channel);
  supervisor.supervise([&] { Prefill(options, cache, *channel, supervisor).run(); });
}

}  // namespace
}  // namespace example

int main(int argc, char** argv) {
  return example::run_program(example::program, [&] {
    if (const auto options = example::parse_prefill_options(argc, argv)) {
      example::run(*options);
    }
  });
}
