// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <regex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <kvferry/channel_stats.hpp>
#include <kvferry/error.hpp>

#include <kvferry/kit/transfer_counters.hpp>

namespace kvferry::inline KVFERRY_ABI {
namespace {

using namespace std::chrono_literals;

TEST(LatencyHistogram, EachDurationIsWithinItsBucketAndBeyondTheOneBefore) {
  for (const std::chrono::nanoseconds duration : {0ns, 1ns, 1000ns, 1001ns, 2000ns, 2001ns, 3'999ns, 5'000'000ns,
                                                  33'554'432'000ns, 33'554'432'001ns, 1'000'000'000'000ns}) {
    const std::size_t bucket = LatencyHistogram::bucket_of(duration);
    EXPECT_LE(duration, LatencyHistogram::upper_bound(bucket));
    if (bucket != 0) {
      EXPECT_GT(duration, LatencyHistogram::upper_bound(bucket - 1));
    }
  }
  EXPECT_EQ(LatencyHistogram::bucket_of(-5ns), 0U);
  EXPECT_EQ(LatencyHistogram::bucket_of(std::chrono::nanoseconds::max()), LatencyHistogram::bucket_count - 1);
}

TEST(LatencyHistogram, AQuantileIsTheBoundOfItsBucket) {
  LatencyHistogram histogram;
  EXPECT_EQ(histogram.quantile(0.5), 0ns);
  histogram.counts[3] = 50;  // to 8 us
  histogram.counts[5] = 49;  // to 32 us
  histogram.counts[9] = 1;   // to 512 us
  EXPECT_EQ(histogram.count(), 100U);
  EXPECT_EQ(histogram.quantile(0), 8us);
  EXPECT_EQ(histogram.quantile(0.5), 8us);
  EXPECT_EQ(histogram.quantile(0.51), 32us);
  EXPECT_EQ(histogram.quantile(0.99), 32us);
  EXPECT_EQ(histogram.quantile(1), 512us);
}

TEST(TransferCounters, CountWhatBecameOfEachKind) {
  kit::TransferCounters counters;
  for (int i = 0; i < 4; ++i) {
    counters.count_start(TransferKind::read);
  }
  counters.count_end(TransferKind::read, {{}, 10, 5'000, 3us});
  counters.count_end(TransferKind::read, {errc::timed_out, 1, 7, 30s});
  counters.count_end(TransferKind::read, {errc::timed_out, 0, 0, 30s});
  const auto all = counters.snapshot();
  const TransferStats& reads = all[static_cast<std::size_t>(TransferKind::read)];
  EXPECT_EQ(reads.started, 4U);
  EXPECT_EQ(reads.succeeded, 1U);
  EXPECT_EQ(reads.failed(), 2U);
  EXPECT_EQ(reads.in_flight(), 1U);
  EXPECT_EQ(reads.objects, 11U);
  EXPECT_EQ(reads.bytes, 5'007U);
  EXPECT_EQ(reads.latency.sum, 3us);
  ASSERT_EQ(reads.failures.size(), 1U);
  EXPECT_EQ(reads.failures[0].cause, errc::timed_out);
  EXPECT_EQ(all[static_cast<std::size_t>(TransferKind::write)].started, 0U);
}

TEST(TransferCounters, NoneHasEndedThatHasNotStarted) {
  kit::TransferCounters counters;
  std::vector<std::jthread> threads;
  std::atomic<int> working{2};
  for (int i = 0; i < 2; ++i) {
    threads.emplace_back([&counters, &working, i] {
      for (int n = 0; n < 20'000; ++n) {
        counters.count_start(TransferKind::write);
        counters.count_end(TransferKind::write, {n % 64 == 0 ? std::error_code(errc::cancelled) : std::error_code(), 1,
                                                 1, std::chrono::microseconds(n % 100 * i)});
      }
      --working;
    });
  }
  while (working != 0) {
    const auto writes = counters.snapshot()[static_cast<std::size_t>(TransferKind::write)];
    ASSERT_LE(writes.succeeded + writes.failed(), writes.started);
  }
  const auto writes = counters.snapshot()[static_cast<std::size_t>(TransferKind::write)];
  EXPECT_EQ(writes.started, 40'000U);
  EXPECT_EQ(writes.in_flight(), 0U);
  EXPECT_EQ(writes.bytes, 40'000U);
}

ChannelStats some_stats() {
  ChannelStats stats;
  stats.transport = "tcp";
  stats.connected_peers = 3;
  stats.identity_conflicts = 5;
  stats.peer_replacements = 6;
  stats.checksum_mismatches = 7;
  TransferStats& writes = stats.transfers[static_cast<std::size_t>(TransferKind::write)];
  writes.started = 12;
  writes.succeeded = 9;
  writes.failures = {{errc::timed_out, 1}, {std::make_error_code(std::errc::connection_refused), 1}};
  writes.objects = 640;
  writes.bytes = 2'621'440;
  writes.latency.counts[4] = 8;
  writes.latency.counts[LatencyHistogram::bucket_count - 1] = 1;
  writes.latency.sum = 40'000'100'001ns;
  stats.paths = {{"lane 0", 2'700'000, 9'000}, {"lane 1", 0, 0}};
  stats.roads = {{"shm", 4, 1}};
  return stats;
}

/// The samples that Prometheus' own client reads in the text, a line each.
std::set<std::string> read_by_prometheus(const std::string& text) {
  const auto file = std::filesystem::temp_directory_path() / ("kvferry_stats_" + std::to_string(::getpid()) + ".prom");
  std::ofstream(file, std::ios::binary) << text;
  std::set<std::string> samples;
  const std::string command =
      "'" KVFERRY_TEST_PYTHON "' '" KVFERRY_TEST_DATA_DIR "/core/read_prometheus.py' '" + file.string() + "'";
  std::FILE* const pipe = ::popen(command.c_str(), "r");
  std::array<char, 512> line{};
  while (std::fgets(line.data(), line.size(), pipe) != nullptr) {
    const std::string sample = line.data();
    samples.insert(sample.substr(0, sample.find('\n')));
  }
  EXPECT_EQ(::pclose(pipe), 0);
  std::filesystem::remove(file);
  return samples;
}

TEST(Prometheus, ItsOwnClientReadsEveryNumber) {
  const auto samples = read_by_prometheus(to_prometheus(some_stats()));
  for (const std::string sample : {
           "gauge kvferry_connected_peers {transport='tcp'} 3.0",
           "counter kvferry_identity_conflicts_total {transport='tcp'} 5.0",
           "counter kvferry_peer_replacements_total {transport='tcp'} 6.0",
           "counter kvferry_checksum_mismatches_total {transport='tcp'} 7.0",
           "counter kvferry_operations_started_total {kind='write',transport='tcp'} 12.0",
           "counter kvferry_operations_started_total {kind='read',transport='tcp'} 0.0",
           "counter kvferry_operations_succeeded_total {kind='write',transport='tcp'} 9.0",
           "gauge kvferry_operations_in_flight {kind='write',transport='tcp'} 1.0",
           "counter kvferry_objects_total {kind='write',transport='tcp'} 640.0",
           "counter kvferry_object_bytes_total {kind='write',transport='tcp'} 2621440.0",
           "histogram kvferry_operation_duration_seconds_bucket {kind='write',le='0.000008000',transport='tcp'} 0.0",
           "histogram kvferry_operation_duration_seconds_bucket {kind='write',le='0.000016000',transport='tcp'} 8.0",
           "histogram kvferry_operation_duration_seconds_bucket {kind='write',le='33.554432000',transport='tcp'} 8.0",
           "histogram kvferry_operation_duration_seconds_bucket {kind='write',le='+Inf',transport='tcp'} 9.0",
           "histogram kvferry_operation_duration_seconds_count {kind='write',transport='tcp'} 9.0",
           "histogram kvferry_operation_duration_seconds_sum {kind='write',transport='tcp'} 40.000100001",
           "counter kvferry_path_bytes_total {direction='out',path='lane 0',transport='tcp'} 2700000.0",
           "counter kvferry_path_bytes_total {direction='in',path='lane 0',transport='tcp'} 9000.0",
           "counter kvferry_path_bytes_total {direction='out',path='lane 1',transport='tcp'} 0.0",
           "counter kvferry_road_connections_total {road='shm',transport='tcp'} 4.0",
           "counter kvferry_road_fallbacks_total {road='shm',transport='tcp'} 1.0",
       }) {
    EXPECT_TRUE(samples.contains(sample)) << sample;
  }
  std::size_t failures = 0;
  for (const std::string& sample : samples) {
    if (sample.starts_with("counter kvferry_operations_failed_total ")) {
      ++failures;
      EXPECT_TRUE(sample.find("category='kvferry'") != std::string::npos ||
                  sample.find("cause='ECONNREFUSED'") != std::string::npos)
          << sample;
    }
  }
  EXPECT_EQ(failures, 2U);
}

TEST(Prometheus, TellsOfHandshakesAndPeers) {
  ChannelStats stats;
  stats.transport = "tcp";
  stats.handshakes = {3, 2, 1, {{errc::timed_out, 4}}, {{errc::page_size_mismatch, 5}}};
  stats.peers = {{"decode \"3\"", true, 2, 7, 1, 4096}, {"gone", false, 1, 0, 0, 0}};
  stats.refused_strangers = {{errc::resource_limit, 8}};
  stats.pending_notifications = 6;
  const auto samples = read_by_prometheus(to_prometheus(stats));
  for (const std::string sample : {
           "counter kvferry_handshakes_total {category='',cause='',direction='out',transport='tcp'} 3.0",
           "counter kvferry_handshakes_total {category='kvferry',cause='timed_out',direction='out',transport='tcp'} "
           "4.0",
           "counter kvferry_handshakes_total {category='',cause='',direction='in',transport='tcp'} 2.0",
           "counter kvferry_handshakes_total "
           "{category='kvferry',cause='page_size_mismatch',direction='in',transport='tcp'} 5.0",
           "counter kvferry_refused_strangers_total {category='kvferry',cause='resource_limit',transport='tcp'} 8.0",
           "counter kvferry_reconnects_total {transport='tcp'} 1.0",
           "gauge kvferry_pending_notifications {transport='tcp'} 6.0",
           "gauge kvferry_peer_connected {peer='decode \"3\"',transport='tcp'} 1.0",
           "gauge kvferry_peer_connected {peer='gone',transport='tcp'} 0.0",
           "counter kvferry_peer_operations_total {outcome='succeeded',peer='decode \"3\"',transport='tcp'} 7.0",
           "counter kvferry_peer_operations_total {outcome='failed',peer='decode \"3\"',transport='tcp'} 1.0",
           "counter kvferry_peer_bytes_total {peer='decode \"3\"',transport='tcp'} 4096.0",
       }) {
    EXPECT_TRUE(samples.contains(sample)) << sample;
  }
}

TEST(Prometheus, SeveralChannelsShareAMetricAndAreToldApartByTheirLabels) {
  std::vector<ChannelStats> channels{some_stats(), some_stats()};
  channels[0].labels = {{"channel", "prefill"}};
  channels[1].labels = {{"channel", "a \"quoted\" back\\slash\nand a new line"}};
  const std::string text = to_prometheus(channels);
  const auto help = text.find("# HELP kvferry_objects_total ");
  EXPECT_NE(help, std::string::npos);
  EXPECT_EQ(text.find("# HELP kvferry_objects_total ", help + 1), std::string::npos);
  const auto samples = read_by_prometheus(text);
  EXPECT_TRUE(samples.contains("gauge kvferry_connected_peers {channel='prefill',transport='tcp'} 3.0"));
  EXPECT_TRUE(samples.contains(
      "gauge kvferry_connected_peers {channel='a \"quoted\" back\\\\slash\\nand a new line',transport='tcp'} 3.0"));
}

TEST(Prometheus, LabelsThatItWouldNotTakeAreRefused) {
  std::set<std::string> names{"", "9lives", "with space", "__reserved", "p\xc3\xa4th"};
  // A name of kvferry's own would be there twice, and Prometheus refuses all of such a text.
  ChannelStats all = some_stats();
  all.handshakes.refused = {{errc::page_size_mismatch, 5}};
  all.refused_strangers = {{errc::resource_limit, 8}};
  all.peers = {{"decode", true, 2, 7, 1, 4096}};
  const std::string text = to_prometheus(all);
  const std::regex label("[{,]([a-z_]+)=\"");
  for (auto it = std::sregex_iterator(text.begin(), text.end(), label); it != std::sregex_iterator(); ++it) {
    names.insert((*it)[1]);
  }
  EXPECT_TRUE(names.contains("le") && names.contains("outcome") && names.contains("road"));
  for (const std::string& name : names) {
    ChannelStats stats = some_stats();
    stats.labels[name] = "value";
    try {
      (void)to_prometheus(stats);
      ADD_FAILURE() << name;
    } catch (const TransferError& error) {
      EXPECT_EQ(error.code(), std::errc::invalid_argument);
      EXPECT_NE(std::string(error.what()).find("'" + name + "' = 'value'"), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace kvferry
