// SPDX-License-Identifier: Apache-2.0
// The same work over UCX's tcp transport: a put (or get) for each page, and a flush for each batch.
#include <fmt/core.h>
#include <poll.h>
#include <ucp/api/ucp.h>

#include <CLI/CLI.hpp>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <optional>
#include <stdexcept>

#include "common/program.hpp"
#include "common/serving_thread.hpp"

namespace bench {
namespace {

void check(ucs_status_t status, const char* what) {
  if (status != UCS_OK) {
    throw std::runtime_error(fmt::format("{}: {}", what, ucs_status_string(status)));
  }
}

/// What both sides have: a worker that speaks tcp only, and a region that it knows.
class Worker {
 public:
  Worker(const Region& region, bool sleeps) : sleeps_(sleeps) {
    ucp_config_t* config = nullptr;
    check(ucp_config_read(nullptr, nullptr, &config), "ucp_config_read");
    check(ucp_config_modify(config, "TLS", "tcp"), "UCX_TLS=tcp");
    ucp_params_t parameters{};
    parameters.field_mask = UCP_PARAM_FIELD_FEATURES;
    parameters.features = UCP_FEATURE_RMA;
    if (sleeps) {
      parameters.features |= UCP_FEATURE_WAKEUP;
    }
    const auto status = ucp_init(&parameters, config, &context_);
    ucp_config_release(config);
    check(status, "ucp_init");
    ucp_worker_params_t worker{};
    worker.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    worker.thread_mode = UCS_THREAD_MODE_SINGLE;
    check(ucp_worker_create(context_, &worker, &worker_), "ucp_worker_create");
    ucp_mem_map_params_t memory{};
    memory.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
    memory.address = region.data();
    memory.length = region.size();
    check(ucp_mem_map(context_, &memory, &memory_), "ucp_mem_map");
    if (sleeps) {
      check(ucp_worker_get_efd(worker_, &descriptor_), "ucp_worker_get_efd");
    }
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker() {
    ucp_mem_unmap(context_, memory_);
    ucp_worker_destroy(worker_);
    ucp_cleanup(context_);
  }

  [[nodiscard]] ucp_worker_h get() const { return worker_; }
  [[nodiscard]] ucp_context_h context() const { return context_; }
  [[nodiscard]] ucp_mem_h memory() const { return memory_; }

  /// Does what there is to do; if that is nothing, sleeps until there is something or for a while, if it is one that sleeps.
  void progress() const {
    if (ucp_worker_progress(worker_) != 0 || !sleeps_ || ucp_worker_arm(worker_) != UCS_OK) {
      return;
    }
    constexpr int milliseconds = 100;  // So that a target notices that it is to end.
    pollfd event{descriptor_, POLLIN, 0};
    ::poll(&event, 1, milliseconds);
  }

  void wait(ucs_status_ptr_t request, const char* what) const {
    if (request == nullptr) {
      return;
    }
    if (UCS_PTR_IS_ERR(request)) {
      check(UCS_PTR_STATUS(request), what);
    }
    ucs_status_t status = UCS_INPROGRESS;
    while ((status = ucp_request_check_status(request)) == UCS_INPROGRESS) {
      progress();
    }
    ucp_request_free(request);
    check(status, what);
  }

 private:
  bool sleeps_;
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  ucp_mem_h memory_ = nullptr;
  int descriptor_ = -1;
};

class UcxInitiator final : public Initiator {
 public:
  UcxInitiator(const Setup& setup, const Json& endpoint)
      : map_(setup.map),
        region_(setup.region),
        reads_(setup.job.target_is_source()),
        worker_(setup.region, setup.job.settings.at("wait") == "block"),
        remote_(endpoint.at("region").get<std::uint64_t>()) {
    const auto address = endpoint.at("address").get<std::vector<std::uint8_t>>();
    const auto key = endpoint.at("key").get<std::vector<std::uint8_t>>();
    ucp_ep_params_t parameters{};
    parameters.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
    parameters.address = reinterpret_cast<const ucp_address_t*>(address.data());
    check(ucp_ep_create(worker_.get(), &parameters, &endpoint_), "ucp_ep_create");
    check(ucp_ep_rkey_unpack(endpoint_, key.data(), &key_), "ucp_ep_rkey_unpack");
    flush();
  }
  ~UcxInitiator() override {
    ucp_rkey_destroy(key_);
    ucp_request_param_t parameters{};
    const auto request = ucp_ep_close_nbx(endpoint_, &parameters);
    if (UCS_PTR_IS_PTR(request)) {
      while (ucp_request_check_status(request) == UCS_INPROGRESS) {
        worker_.progress();
      }
      ucp_request_free(request);
    }
  }

  void run(std::span<Stream> streams) override {
    run_blocking(streams, [this](std::size_t stream, std::uint64_t batch) {
      const auto local = map_.initiator_pages(stream, batch);
      const auto remote = map_.target_pages(stream, batch);
      for (std::size_t i = 0; i < local.size(); ++i) {
        start(region_.page(local[i]), remote_ + remote[i] * map_.page_size());
      }
      // A put is done at the target when a flush that comes after it is.
      flush();
      for (const auto request : requests_) {
        worker_.wait(request, reads_ ? "ucp_get_nbx" : "ucp_put_nbx");
      }
      requests_.clear();
    });
  }

 private:
  void start(std::span<std::byte> page, std::uint64_t remote) {
    ucp_request_param_t parameters{};
    const auto request = reads_ ? ucp_get_nbx(endpoint_, page.data(), page.size(), remote, key_, &parameters)
                                : ucp_put_nbx(endpoint_, page.data(), page.size(), remote, key_, &parameters);
    if (request != nullptr) {
      if (UCS_PTR_IS_ERR(request)) {
        check(UCS_PTR_STATUS(request), reads_ ? "ucp_get_nbx" : "ucp_put_nbx");
      }
      requests_.push_back(request);
    }
  }

  void flush() {
    ucp_request_param_t parameters{};
    worker_.wait(ucp_ep_flush_nbx(endpoint_, &parameters), "ucp_ep_flush_nbx");
  }

  const PageMap& map_;
  const Region& region_;
  bool reads_;
  Worker worker_;
  std::uint64_t remote_;
  ucp_ep_h endpoint_ = nullptr;
  ucp_rkey_h key_ = nullptr;
  std::vector<ucs_status_ptr_t> requests_;
};

class UcxTarget final : public Target {
 public:
  explicit UcxTarget(const Setup& setup) : worker_(setup.region, setup.job.settings.at("wait") == "block") {
    ucp_address_t* address = nullptr;
    std::size_t size = 0;
    check(ucp_worker_get_address(worker_.get(), &address, &size), "ucp_worker_get_address");
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(address);
    endpoint_["address"] = std::vector<std::uint8_t>(bytes, bytes + size);
    ucp_worker_release_address(worker_.get(), address);
    void* key = nullptr;
    check(ucp_rkey_pack(worker_.context(), worker_.memory(), &key, &size), "ucp_rkey_pack");
    bytes = static_cast<const std::uint8_t*>(key);
    endpoint_["key"] = std::vector<std::uint8_t>(bytes, bytes + size);
    ucp_rkey_buffer_release(key);
    endpoint_["region"] = reinterpret_cast<std::uintptr_t>(setup.region.data());
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
