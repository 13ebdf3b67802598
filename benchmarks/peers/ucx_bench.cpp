// SPDX-License-Identifier: Apache-2.0
// The same work over UCX's tcp transport: a put (or get) for each page, and a flush for each batch.
#include <ucp/api/ucp.h>

#include <CLI/CLI.hpp>

#include <atomic>
#include <cstdint>
#include <optional>

#include "common/program.hpp"
#include "common/serving_thread.hpp"
#include "ucx_worker.hpp"

namespace bench {
namespace {

class UcxInitiator final : public Initiator {
 public:
  UcxInitiator(const Setup& setup, const Json& endpoint)
      : map_(setup.map),
        region_(setup.region),
        reads_(setup.job.target_is_source()),
        worker_({setup.region.data(), setup.region.size()}, setup.job.settings.at("wait") == "block"),
        target_(worker_, endpoint.at("address").get<std::vector<std::uint8_t>>(),
                endpoint.at("key").get<std::vector<std::uint8_t>>()),
        remote_(endpoint.at("region").get<std::uint64_t>()) {}

  void run(std::span<Stream> streams) override {
    run_blocking(streams, [this](std::size_t stream, std::uint64_t batch) {
      const auto local = map_.initiator_pages(stream, batch);
      const auto remote = map_.target_pages(stream, batch);
      for (std::size_t i = 0; i < local.size(); ++i) {
        start(region_.page(local[i]), remote_ + remote[i] * map_.page_size());
      }
      target_.flush();
      for (const auto request : requests_) {
        worker_.wait(request, reads_ ? "ucp_get_nbx" : "ucp_put_nbx");
      }
      requests_.clear();
    });
  }

 private:
  void start(std::span<std::byte> page, std::uint64_t remote) {
    if (const auto request = reads_ ? target_.get(page, remote) : target_.put(page, remote); request != nullptr) {
      requests_.push_back(request);
    }
  }

  const PageMap& map_;
  const Region& region_;
  bool reads_;
  Worker worker_;
  RemoteWorker target_;
  std::uint64_t remote_;
  std::vector<ucs_status_ptr_t> requests_;
};

class UcxTarget final : public Target {
 public:
  explicit UcxTarget(const Setup& setup)
      : worker_({setup.region.data(), setup.region.size()}, setup.job.settings.at("wait") == "block"),
        endpoint_{{"address", worker_.address()},
                  {"key", worker_.key()},
                  {"region", reinterpret_cast<std::uintptr_t>(setup.region.data())}} {
    thread_.start([this](const std::stop_token& stop) {
      while (!stop.stop_requested()) {
        worker_.progress();
      }
    });
  }

  [[nodiscard]] Json endpoint() const override { return endpoint_; }

  void finish() override { thread_.finish(); }

 private:
  Worker worker_;
  Json endpoint_;
  ServingThread thread_;
};

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  std::string wait = "poll";
  Program program;
  program.name = "ucx_bench";
  program.description = "Moves batches of pages with UCX's put and get over its tcp transport.";
  program.operations = {"write", "read"};
  program.add_options = [&](CLI::App& app) {
    app.add_option("--wait", wait, "How both sides wait: poll (always), block (for the worker's event)")
        ->check(CLI::IsMember({"poll", "block"}).description(""))
        ->capture_default_str();
  };
  program.configure = [&](Job& job) {
    job.variant = "ucx tcp " + wait;
    job.settings = {{"wait", wait}, {"version", ucp_get_version_string()}};
  };
  use_halves<UcxInitiator, UcxTarget>(program);
  return run_program(program, argc, argv);
}
