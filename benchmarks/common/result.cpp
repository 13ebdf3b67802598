// SPDX-License-Identifier: Apache-2.0
#include "result.hpp"

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <utility>

namespace bench {
namespace {

/// Keeps the order in which the keys are written here.
using OrderedJson = nlohmann::ordered_json;

/// Nearest rank.
Distribution distribution_of(std::vector<std::uint64_t> nanoseconds) {
  if (nanoseconds.empty()) {
    return {};
  }
  std::ranges::sort(nanoseconds);
  const auto at = [&](double part) {
    const auto rank = static_cast<std::size_t>(std::ceil(part * static_cast<double>(nanoseconds.size())));
    return static_cast<double>(nanoseconds[std::max<std::size_t>(rank, 1) - 1]) / 1e3;
  };
  return {at(0.5), at(0.99), at(0.999), at(1)};
}

OrderedJson to_json(const Distribution& latency) {
  return {{"p50", latency.p50}, {"p99", latency.p99}, {"p999", latency.p999}, {"max", latency.max}};
}

OrderedJson to_json(const Window& window) {
  return {{"lists", window.lists}, {"drained", window.drained}, {"left", window.left}};
}

OrderedJson to_json(const Result& result) {
  const auto side = [&](const std::optional<Usage>& usage) -> OrderedJson {
    if (!usage) {
      return nullptr;
    }
    const auto syscalls = result.syscalls_per_batch(*usage);
    return {{"cpu_seconds_per_gib", result.cpu_seconds_per_gib(*usage)},
            {"user_seconds", usage->user_seconds},
            {"system_seconds", usage->system_seconds},
            {"syscalls_per_batch", syscalls ? OrderedJson(*syscalls) : OrderedJson()}};
  };
  return {{"program", result.program},
          {"variant", result.job.variant},
          {"path", result.path},
          {"operation", result.job.operation},
          {"page_bytes", result.job.page},
          {"batch_pages", result.job.batch},
          {"depth", result.job.depth},
          {"threads", result.job.threads},
          {"peers", result.job.peers},
          {"region_bytes", result.job.region},
          {"adjacent", result.job.adjacent},
          {"settings", result.job.settings},
          {"seconds", result.seconds},
          {"batches", result.batches},
          {"gigabytes_per_second", result.gigabytes_per_second()},
          {"latency_us", to_json(result.latency)},
          {"submission_us", result.submission ? to_json(*result.submission) : OrderedJson()},
          {"slowest_peer_of_mean", result.slowest_peer},
          {"window", result.window ? to_json(*result.window) : OrderedJson()},
          {"initiator", side(result.initiator)},
          {"target", side(result.target)},
          {"verified", true}};
}

/// A line of CSV: the JSON without its lists of settings, a column for each number.
void flatten(const OrderedJson& json, const std::string& prefix, std::vector<std::pair<std::string, std::string>>& columns) {
  for (const auto& [key, value] : json.items()) {
    if (value.is_object()) {
      flatten(value, prefix + key + '.', columns);
    } else {
      auto text = value.is_string() ? value.get<std::string>() : value.is_null() ? std::string() : value.dump();
      std::ranges::replace(text, ',', ';');
      columns.emplace_back(prefix + key, std::move(text));
    }
  }
}

/// The columns that every program has, also where one of them has nothing to put in.
std::string to_csv(const std::vector<Result>& results) {
  const OrderedJson no_distribution = to_json(Distribution{});
  const OrderedJson no_side = {
      {"cpu_seconds_per_gib", {}}, {"user_seconds", {}}, {"system_seconds", {}}, {"syscalls_per_batch", {}}};
  std::string csv;
  for (const auto& result : results) {
    OrderedJson json = to_json(result);
    json["settings"] = json["settings"].dump();
    if (json["submission_us"].is_null()) {
      json["submission_us"] = {{"p50", {}}, {"p99", {}}, {"p999", {}}, {"max", {}}};
    }
    if (json["window"].is_null()) {
      json["window"] = {{"lists", {}}, {"drained", {}}, {"left", {}}};
    }
    if (json["target"].is_null()) {
      json["target"] = no_side;
    }
    std::vector<std::pair<std::string, std::string>> columns;
    flatten(json, "", columns);
    std::vector<std::string> names;
    std::vector<std::string> values;
    for (auto& [name, value] : columns) {
      names.push_back(std::move(name));
      values.push_back(std::move(value));
    }
    if (csv.empty()) {
      csv = fmt::format("{}\n", fmt::join(names, ","));
    }
    csv += fmt::format("{}\n", fmt::join(values, ","));
  }
  return csv;
}

void write_file(const std::string& name, const std::string& content) {
  if (name == "-") {
    fmt::print("{}", content);
    return;
  }
  std::ofstream file(name);
  if (!(file << content << std::flush)) {
    throw std::runtime_error(fmt::format("cannot write '{}'", name));
  }
}

std::string readable_size(std::size_t bytes) {
  if (bytes >= (1U << 20U) && bytes % (1U << 20U) == 0) {
    return fmt::format("{}M", bytes >> 20U);
  }
  return bytes >= 1024 && bytes % 1024 == 0 ? fmt::format("{}K", bytes >> 10U) : fmt::format("{}", bytes);
}

constexpr const char* row = "{:<24} {:<8} {:>6} {:>6} {:>9} {:>5} {:>7} {:>9} {:>9} {:>9} {:>12} {:>15} {:>8}\n";

void print_row(const Result& result) {
  const auto both = [&](auto&& format_side) {
    return result.target ? fmt::format("{}/{}", format_side(result.initiator), format_side(*result.target))
                         : format_side(result.initiator);
  };
  fmt::print(row, result.job.variant, result.job.operation, readable_size(result.job.page), result.job.batch,
             fmt::format("{}x{}", result.job.threads, result.job.depth), result.job.peers,
             fmt::format("{:.3f}", result.gigabytes_per_second()), fmt::format("{:.1f}", result.latency.p50),
             fmt::format("{:.1f}", result.latency.p99), fmt::format("{:.1f}", result.latency.p999),
             both([&](const Usage& usage) { return fmt::format("{:.2f}", result.cpu_seconds_per_gib(usage)); }),
             both([&](const Usage& usage) {
               const auto syscalls = result.syscalls_per_batch(usage);
               return syscalls ? fmt::format("{:.1f}", *syscalls) : std::string("-");
             }),
             "yes");
  std::fflush(stdout);
}

}  // namespace

double Result::gigabytes_per_second() const { return static_cast<double>(batches * job.batch_bytes()) / seconds / 1e9; }

double Result::cpu_seconds_per_gib(const Usage& usage) const {
  return usage.cpu_seconds() / (static_cast<double>(batches * job.batch_bytes()) / double(1U << 30U));
}

std::optional<double> Result::syscalls_per_batch(const Usage& usage) const {
  if (!usage.syscalls) {
    return std::nullopt;
  }
  return static_cast<double>(*usage.syscalls) / static_cast<double>(batches);
}

void summarize(std::span<const Stream> streams, Clock::time_point started, Result& result) {
  std::vector<std::uint64_t> latencies;
  std::vector<std::uint64_t> submissions;
  std::vector<double> rates(result.job.peers);
  auto ended = started;
  for (const auto& stream : streams) {
    const auto& own = stream.latencies();
    latencies.insert(latencies.end(), own.begin(), own.end());
    submissions.insert(submissions.end(), stream.submissions().begin(), stream.submissions().end());
    ended = std::max(ended, stream.ended());
    const double seconds = std::chrono::duration<double>(stream.ended() - started).count();
    rates[stream.id() / result.job.streams_per_peer] += static_cast<double>(own.size()) / seconds;
  }
  result.seconds = std::chrono::duration<double>(ended - started).count();
  result.batches = latencies.size();
  result.latency = distribution_of(std::move(latencies));
  if (!submissions.empty()) {
    result.submission = distribution_of(std::move(submissions));
  }
  double sum = 0;
  for (const double rate : rates) {
    sum += rate;
  }
  result.slowest_peer = *std::ranges::min_element(rates) * static_cast<double>(rates.size()) / sum;
}

Report::Report(ReportOptions options)
    : options_(std::move(options)), table_(options_.json != "-" && options_.csv != "-") {
  if (table_) {
    fmt::print(row, "variant", "oper.", "page", "batch", "thr.xdep.", "peers", "GB/s", "p50 us", "p99 us", "p99.9 us",
               "CPU s/GiB", "syscalls/batch", "verified");
  }
}

void Report::add(const Result& result) {
  results_.push_back(result);
  if (table_) {
    print_row(result);
  }
}

void Report::finish() const {
  if (!options_.json.empty()) {
    OrderedJson json = OrderedJson::array();
    for (const auto& result : results_) {
      json.push_back(to_json(result));
    }
    write_file(options_.json, json.dump(1) + '\n');
  }
  if (!options_.csv.empty()) {
    write_file(options_.csv, to_csv(results_));
  }
}

}  // namespace bench
