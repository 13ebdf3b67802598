// SPDX-License-Identifier: Apache-2.0
#include "usage.hpp"

#include <linux/perf_event.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <system_error>

namespace bench {
namespace {

/// A perf event; open until the process ends.
int syscall_event = -1;

double seconds(const timeval& time) {
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
}

}  // namespace

Usage operator-(const Usage& later, const Usage& earlier) {
  Usage difference{later.user_seconds - earlier.user_seconds, later.system_seconds - earlier.system_seconds, {}};
  if (later.syscalls && earlier.syscalls) {
    difference.syscalls = *later.syscalls - *earlier.syscalls;
  }
  return difference;
}

void to_json(Json& json, const Usage& usage) {
  json = {{"user_seconds", usage.user_seconds}, {"system_seconds", usage.system_seconds}, {"syscalls", nullptr}};
  if (usage.syscalls) {
    json["syscalls"] = *usage.syscalls;
  }
}

void from_json(const Json& json, Usage& usage) {
  json.at("user_seconds").get_to(usage.user_seconds);
  json.at("system_seconds").get_to(usage.system_seconds);
  usage.syscalls.reset();
  if (const auto& syscalls = json.at("syscalls"); !syscalls.is_null()) {
    usage.syscalls = syscalls.get<std::uint64_t>();
  }
}

void count_syscalls() {
  if (syscall_event >= 0) {
    return;
  }
  std::uint64_t id = 0;
  if (constexpr const char* file = "/sys/kernel/tracing/events/raw_syscalls/sys_enter/id";
      !(std::ifstream(file) >> id)) {
    throw std::system_error(errno, std::system_category(), file);
  }
  perf_event_attr attributes{};
  attributes.type = PERF_TYPE_TRACEPOINT;
  attributes.size = sizeof(attributes);
  attributes.config = id;
  attributes.inherit = 1;
  syscall_event = static_cast<int>(::syscall(SYS_perf_event_open, &attributes, 0, -1, -1, PERF_FLAG_FD_CLOEXEC));
  if (syscall_event < 0) {
    throw std::system_error(errno, std::system_category(), "counting system calls");
  }
}

Usage current_usage() {
  rusage used{};
  ::getrusage(RUSAGE_SELF, &used);
  Usage usage{seconds(used.ru_utime), seconds(used.ru_stime), {}};
  std::uint64_t count = 0;
  if (syscall_event >= 0 && ::read(syscall_event, &count, sizeof(count)) == sizeof(count)) {
    usage.syscalls = count;
  }
  return usage;
}

}  // namespace bench
