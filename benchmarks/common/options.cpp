// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <CLI/CLI.hpp>

#include "control.hpp"
#include "option_checks.hpp"

namespace bench {
namespace {

void add_common_options(CLI::App& app, const Program& program, Options& options) {
  Job& job = options.job;
  app.add_option("--operation", job.operation, "What the initiator does; sendrecv is paired, the others are one-sided")
      ->type_name("NAME")
      ->capture_default_str()
      ->check(CLI::IsMember(program.operations));
  app.add_option("--page", options.pages, "Bytes of a page (4096, 64K, 1M, ...); several: one after the other")
      ->type_name("SIZE")
      ->delimiter(',')
      ->transform(size_with_unit())
      ->check(between(std::size_t{1}, std::size_t{1} << 30U));
  app.add_option("--batch", options.batches, "Pages in a batch; several: each with each page size")
      ->type_name("N")
      ->delimiter(',')
      ->check(between(std::size_t{1}, std::size_t{1} << 24U));
  app.add_option("--region", job.region, "Bytes of the region on each side, at least one batch for each stream")
      ->type_name("SIZE")
      ->transform(size_with_unit())
      ->check(between(std::uint64_t{1}, std::uint64_t{1} << 40U));
  app.add_option("--seconds", job.seconds, "How long the timed part takes")
      ->type_name("SECONDS")
      ->capture_default_str()
      ->check(between(0.001, 86'400.0));
  app.add_option("--iterations", job.iterations, "Instead of --seconds: how many batches each stream moves")
      ->type_name("N")
      ->check(between(std::uint64_t{1}, std::uint64_t{1} << 40U));
  app.add_option("--warm-up", job.warm_up, "Seconds before the timed part (with --iterations: one batch instead)")
      ->type_name("SECONDS")
      ->capture_default_str()
      ->check(between(0.0, 3600.0));
  app.add_option("--timeout", job.timeout, "Seconds on top of --seconds after which a run is given up")
      ->type_name("SECONDS")
      ->capture_default_str()
      ->check(between(1U, 86'400U));
  app.add_flag("--syscalls", job.count_syscalls,
               "Count system calls, which slows them down a little; needs a mounted tracefs and root or CAP_PERFMON");
  app.add_option("--json", options.report.json, "Write the results to this file; -: to stdout, instead of the table")
      ->type_name("FILE");
  app.add_option("--csv", options.report.csv, "The same as CSV")->type_name("FILE");
  auto* listen = app.add_option("--listen", options.listen,
                                "Be the target, for an initiator on another machine: it brings all other options")
                     ->type_name("HOST:PORT");
  app.add_option("--connect", options.connect, "Where the target listens (default: it is started on this machine)")
      ->type_name("HOST:PORT")
      ->excludes(listen);
  app.add_flag("--adjacent", job.adjacent, "A batch's pages lie side by side (default: in random order)");
  app.add_flag("--corrupt", job.corrupt, "Fault injection: change a byte of what arrived; the verification must fail");
  app.add_flag(target_option, options.target_on_stdin)->group("");
  app.get_formatter()->column_width(32);
}

}  // namespace

int parse_options(const Program& program, int argc, char** argv, Options& options) {
  options.job.seconds = 1;
  options.job.warm_up = 0.05;
  options.job.timeout = 60;
  options.job.region = std::uint64_t{256} << 20U;
  options.pages = {64 * 1024};
  options.batches = {64};
  CLI::App app(program.description, program.name);
  add_common_options(app, program, options);
  program.add_options(app);
  try {
    app.parse(argc, argv);
    program.configure(options.job);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error);
    return code == 0 ? 0 : 2;
  }
  return -1;
}

}  // namespace bench
