// SPDX-License-Identifier: Apache-2.0
// The same pages copied within a process: what the memory can do.
#include <CLI/CLI.hpp>

#include <cstring>

#include "common/program.hpp"

namespace bench {
namespace {

class MemcpyInitiator final : public Initiator {
 public:
  explicit MemcpyInitiator(const Setup& setup)
      : map_(setup.map), destination_(setup.region), source_(map_.pages(), map_.page_size()) {
    source_.fill_as_source();
    destination_.fill_as_destination();
  }

  void run(std::span<Stream> streams) override {
    run_blocking(streams, [this](std::size_t stream, std::uint64_t batch) {
      const auto from = map_.initiator_pages(stream, batch);
      const auto to = map_.target_pages(stream, batch);
      for (std::size_t i = 0; i < from.size(); ++i) {
        std::memcpy(destination_.page(to[i]).data(), source_.page(from[i]).data(), map_.page_size());
      }
    });
  }

 private:
  const PageMap& map_;
  const Region& destination_;
  Region source_;
};

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  std::size_t threads = 1;
  Program program;
  program.name = "memcpy_bench";
  program.description = "Copies batches of pages from scattered places to scattered places in one process.";
  program.operations = {"write"};
  program.add_options = [&](CLI::App& app) {
    app.add_option("--threads", threads, "How many threads copy")
        ->check(CLI::Range(1, 256).description(""))
        ->capture_default_str();
  };
  program.configure = [&](Job& job) {
    job.variant = "memcpy";
    job.threads = threads;
    job.streams_per_peer = threads;
  };
  program.make_initiator = [](const Setup& setup, const Json&) { return std::make_unique<MemcpyInitiator>(setup); };
  return run_program(program, argc, argv);
}
