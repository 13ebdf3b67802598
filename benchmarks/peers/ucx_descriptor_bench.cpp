// SPDX-License-Identifier: Apache-2.0
// Measures how long UCX takes to submit as many puts as descriptor_bench's writes have descriptors. Prints a row for its table.
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "common/descriptors.hpp"
#include "common/serving_thread.hpp"
#include "ucx_worker.hpp"

int main(int argc, char** argv) {
  bench::Descriptors sizes;
  CLI::App app(
      "Measures what it costs to submit many puts over UCX's tcp transport, on loopback: the calls of ucp_put_nbx.");
  sizes.add_options(app);
  CLI11_PARSE(app, argc, argv);

  std::vector<std::byte> source(sizes.region_bytes(), std::byte{1});
  std::vector<std::byte> destination(sizes.region_bytes());
  const bench::Worker initiator(source, false);
  const bench::Worker target(destination, false);
  bench::ServingThread serving;
  serving.start([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      target.progress();
    }
  });
  {
    const bench::RemoteWorker remote(initiator, target.address(), target.key());
    const auto from = sizes.scattered(1);
    const auto to = sizes.scattered(2);
    const auto begin = reinterpret_cast<std::uintptr_t>(destination.data());
    std::vector<ucs_status_ptr_t> requests;
    sizes.measure(
        "UCX: `ucp_put_nbx` for each",
        [&] {
          requests.clear();
          requests.reserve(sizes.count);
          std::ranges::fill(destination, std::byte{0});
        },
        [&] {
          for (std::size_t i = 0; i < sizes.count; ++i) {
            if (const auto request = remote.put(std::span(source).subspan(from[i] * sizes.block, sizes.block),
                                                begin + to[i] * sizes.block);
                request != nullptr) {
              requests.push_back(request);
            }
          }
        },
        [&] {
          for (const auto request : requests) {
            initiator.wait(request, "ucp_put_nbx");
          }
          remote.flush();
        });
  }
  serving.finish();
  if (std::ranges::count(destination, std::byte{1}) != static_cast<std::ptrdiff_t>(sizes.count * sizes.block)) {
    fmt::print(stderr, "verification failed: not all blocks have arrived\n");
    return 3;
  }
  return EXIT_SUCCESS;
}
