// SPDX-License-Identifier: Apache-2.0
#include "program.hpp"

#include <fmt/core.h>
#include <unistd.h>
#include <kvferry/url.hpp>

#include <cmath>
#include <csignal>
#include <cstdio>
#include <exception>
#include <optional>

#include "control.hpp"
#include "options.hpp"
#include "result.hpp"
#include "usage.hpp"

namespace bench {
namespace {

/// The bytes that arrived differ from those that were sent.
class VerificationFailure : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

extern "C" void give_up(int) {
  constexpr char message[] = "the run took longer than its time-out\n";
  static_cast<void>(!::write(STDERR_FILENO, message, sizeof(message) - 1));
  ::_exit(4);
}

void prepare_process(const Job& job) {
  if (job.count_syscalls) {
    count_syscalls();
  }
  // Ends the process if it hangs, for instance because the other one died.
  std::signal(SIGALRM, give_up);
  ::alarm(job.timeout + static_cast<unsigned>(std::ceil(job.seconds + job.warm_up)));
}

void check(const Job& job, const PageMap& map, const Region& destination, const std::vector<std::uint64_t>& moved) {
  if (job.corrupt) {
    const auto page = job.target_is_source() ? map.initiator_pages(0, 0).back() : map.target_pages(0, 0).back();
    destination.page(page).back() ^= std::byte{1};
  }
  if (const auto problem = verify(destination, map, !job.target_is_source(), moved)) {
    throw VerificationFailure(*problem);
  }
}

void fill(const Region& region, bool as_source) {
  if (as_source) {
    region.fill_as_source();
  } else {
    region.fill_as_destination();
  }
}

std::vector<Stream> make_streams(const Job& job) {
  std::vector<Stream> streams;
  for (std::size_t id = 0; id < job.streams(); ++id) {
    streams.emplace_back(id);
  }
  return streams;
}

void run(Initiator& initiator, std::vector<Stream>& streams, double seconds, std::uint64_t batches) {
  Limit limit;
  if (batches != 0) {
    limit.batches = batches;
  } else {
    limit.deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  }
  for (auto& stream : streams) {
    stream.begin_run(limit);
  }
  initiator.run(streams);
}

Result initiate(const Program& program, const Job& job, Control* control) {
  prepare_process(job);
  const PageMap map(job);
  const Region region(map.pages(), map.page_size());
  fill(region, !job.target_is_source());
  const Json endpoint = control != nullptr ? control->ask(job) : Json();
  const auto tell = [&](const char* step) { return control != nullptr ? control->ask({{"step", step}}) : Json(); };

  const auto initiator = program.make_initiator({job, map, region, {}}, endpoint);
  tell("connected");
  auto streams = make_streams(job);
  run(*initiator, streams, job.warm_up, job.iterations == 0 ? 0 : 1);

  Result result;
  result.program = program.name;
  result.job = job;
  const Json target_before = tell("usage");
  const Usage before = current_usage();
  const auto started = Clock::now();
  run(*initiator, streams, job.seconds, job.iterations);
  result.initiator = current_usage() - before;
  const Json target_after = tell("usage");
  if (control != nullptr) {
    result.target = target_after.get<Usage>() - target_before.get<Usage>();
  }
  summarize(streams, started, result);
  result.path = initiator->path();
  result.window = initiator->window();

  initiator->finish();
  std::vector<std::uint64_t> moved;
  for (const auto& stream : streams) {
    moved.push_back(stream.moved());
  }
  if (control != nullptr) {
    const Json verdict = control->ask({{"step", "finish"}, {"moved", moved}});
    if (!verdict.at("problem").is_null()) {
      throw VerificationFailure(verdict.at("problem").get<std::string>());
    }
  }
  if (control == nullptr || job.target_is_source()) {
    check(job, map, region, moved);
  }
  ::alarm(0);
  return result;
}

/// One job, on the target's side.
void serve(const Program& program, const Job& job, const std::string& host, Control& control) {
  prepare_process(job);
  const PageMap map(job);
  const Region region(map.pages(), map.page_size());
  fill(region, job.target_is_source());
  const auto target = program.make_target({job, map, region, host});
  control.send(target->endpoint());
  for (;;) {
    const Json message = control.receive();
    const auto step = message.at("step").get<std::string>();
    if (step == "connected") {
      target->connected();
      control.send(Json::object());
    } else if (step == "usage") {
      control.send(current_usage());
    } else {
      target->finish();
      Json verdict = {{"problem", nullptr}};
      if (!job.target_is_source()) {
        try {
          check(job, map, region, message.at("moved").get<std::vector<std::uint64_t>>());
        } catch (const VerificationFailure& failure) {
          verdict["problem"] = failure.what();
        }
      }
      control.send(verdict);
      break;
    }
  }
  ::alarm(0);
}

void run_target(const Program& program, Control control, const std::string& host) {
  while (!control.ended()) {
    try {
      serve(program, control.receive().get<Job>(), host, control);
    } catch (const std::exception& error) {
      control.send({{"error", error.what()}});
      throw;
    }
  }
}

void run_initiator(const Program& program, const Options& options) {
  std::optional<TargetProcess> process;
  std::optional<Control> remote;
  Control* control = nullptr;
  if (!options.connect.empty()) {
    control = &remote.emplace(Control::connect(options.connect));
  } else if (program.make_target) {
    control = &process.emplace().control();
  }
  Report report(options.report);
  for (const auto page : options.pages) {
    for (const auto batch : options.batches) {
      Job job = options.job;
      job.page = page;
      job.batch = batch;
      report.add(initiate(program, job, control));
    }
  }
  if (process) {
    process->finish();
  }
  report.finish();
}

}  // namespace

int run_program(const Program& program, int argc, char** argv) {
  Options options;
  if (const int code = parse_options(program, argc, argv, options); code >= 0) {
    return code;
  }
  try {
    if (options.target_on_stdin) {
      run_target(program, Control(STDIN_FILENO), "127.0.0.1");
    } else if (!options.listen.empty()) {
      run_target(program, Control::accept(options.listen), kvferry::parse_url(options.listen).host);
    } else {
      run_initiator(program, options);
    }
    return 0;
  } catch (const VerificationFailure& failure) {
    fmt::print(stderr, "{}: verification failed: {}\n", program.name, failure.what());
    return 3;
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}: {}\n", program.name, error.what());
    return 1;
  }
}

}  // namespace bench
