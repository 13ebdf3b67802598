// SPDX-License-Identifier: Apache-2.0
// The same work over libfabric's tcp;ofi_rxm provider: an RMA write (or read) for each page, complete when it is delivered.
#include <fmt/core.h>
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <CLI/CLI.hpp>

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>

#include "common/program.hpp"
#include "common/serving_thread.hpp"

namespace bench {
namespace {

void check(long result, const char* what) {
  if (result < 0) {
    throw std::runtime_error(fmt::format("{}: {}", what, fi_strerror(static_cast<int>(-result))));
  }
}

struct Close {
  template <class Object>
  void operator()(Object* object) const {
    fi_close(&object->fid);
  }
  void operator()(fi_info* info) const { fi_freeinfo(info); }
};

template <class Object>
using Owned = std::unique_ptr<Object, Close>;

/// The common part of both sides: an endpoint at an address of the given host, and a region that it knows.
class Fabric {
 public:
  Fabric(const Region& region, const std::string& provider, const std::string& host, bool is_target) {
    info_ = find(provider, host);
    fid_fabric* fabric = nullptr;
    check(fi_fabric(info_->fabric_attr, &fabric, nullptr), "fi_fabric");
    fabric_.reset(fabric);
    fid_domain* domain = nullptr;
    check(fi_domain(fabric, info_.get(), &domain, nullptr), "fi_domain");
    domain_.reset(domain);
    fi_cq_attr queue_attributes{};
    queue_attributes.format = FI_CQ_FORMAT_CONTEXT;
    queue_attributes.size = info_->tx_attr->size;
    fid_cq* queue = nullptr;
    check(fi_cq_open(domain, &queue_attributes, &queue, nullptr), "fi_cq_open");
    queue_.reset(queue);
    fi_av_attr vector_attributes{};
    vector_attributes.type = FI_AV_TABLE;
    fid_av* vector = nullptr;
    check(fi_av_open(domain, &vector_attributes, &vector, nullptr), "fi_av_open");
    vector_.reset(vector);
    fid_mr* memory = nullptr;
    const std::uint64_t access = is_target ? FI_REMOTE_READ | FI_REMOTE_WRITE : FI_READ | FI_WRITE;
    check(fi_mr_reg(domain, region.data(), region.size(), access, 0, is_target ? 1 : 2, 0, &memory, nullptr),
          "fi_mr_reg");
    memory_.reset(memory);
    fid_ep* endpoint = nullptr;
    check(fi_endpoint(domain, info_.get(), &endpoint, nullptr), "fi_endpoint");
    endpoint_.reset(endpoint);
    check(fi_ep_bind(endpoint, &queue->fid, FI_TRANSMIT | FI_RECV), "fi_ep_bind");
    check(fi_ep_bind(endpoint, &vector->fid, 0), "fi_ep_bind");
    check(fi_enable(endpoint), "fi_enable");
  }

  [[nodiscard]] fid_ep* endpoint() const { return endpoint_.get(); }
  [[nodiscard]] fid_av* vector() const { return vector_.get(); }
  [[nodiscard]] fid_mr* memory() const { return memory_.get(); }
  [[nodiscard]] bool addresses_are_virtual() const { return (info_->domain_attr->mr_mode & FI_MR_VIRT_ADDR) != 0; }
  [[nodiscard]] std::string provider() const { return info_->fabric_attr->prov_name; }

  /// Makes progress. @return how many operations have completed.
  std::size_t poll() const {
    std::array<fi_cq_entry, 64> entries{};
    const auto count = fi_cq_read(queue_.get(), entries.data(), entries.size());
    if (count == -FI_EAGAIN) {
      return 0;
    }
    if (count == -FI_EAVAIL) {
      fi_cq_err_entry error{};
      fi_cq_readerr(queue_.get(), &error, 0);
      throw std::runtime_error(fmt::format("an operation failed: {}", fi_strerror(error.err)));
    }
    check(count, "fi_cq_read");
    return static_cast<std::size_t>(count);
  }

 private:
  static Owned<fi_info> find(const std::string& provider, const std::string& host) {
    const Owned<fi_info> hints(fi_allocinfo());
    hints->fabric_attr->prov_name = ::strdup(provider.c_str());  // fi_freeinfo frees it.
    hints->ep_attr->type = FI_EP_RDM;
    hints->caps = FI_RMA | FI_MSG;
    hints->mode = FI_CONTEXT;
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
    hints->domain_attr->threading = FI_THREAD_SAFE;
    hints->tx_attr->op_flags = FI_DELIVERY_COMPLETE;
    fi_info* found = nullptr;
    check(fi_getinfo(FI_VERSION(1, 17), host.c_str(), "0", FI_SOURCE, hints.get(), &found), "fi_getinfo");
    return Owned<fi_info>(found);
  }

  Owned<fi_info> info_;
  Owned<fid_fabric> fabric_;
  Owned<fid_domain> domain_;
  Owned<fid_cq> queue_;
  Owned<fid_av> vector_;
  Owned<fid_mr> memory_;
  Owned<fid_ep> endpoint_;
};

class FabricInitiator final : public Initiator {
 public:
  FabricInitiator(const Setup& setup, const Json& endpoint)
      : map_(setup.map),
        region_(setup.region),
        reads_(setup.job.target_is_source()),
        fabric_(setup.region, setup.job.settings.at("provider"), endpoint.at("host"), false),
        remote_(endpoint.at("region").get<std::uint64_t>()),
        key_(endpoint.at("key").get<std::uint64_t>()),
        contexts_(setup.job.batch) {
    const auto address = endpoint.at("address").get<std::vector<std::uint8_t>>();
    if (fi_av_insert(fabric_.vector(), address.data(), 1, &peer_, 0, nullptr) != 1) {
      throw std::runtime_error("fi_av_insert");
    }
  }

  void run(std::span<Stream> streams) override {
    run_blocking(streams, [this](std::size_t stream, std::uint64_t batch) {
      const auto local = map_.initiator_pages(stream, batch);
      const auto remote = map_.target_pages(stream, batch);
      std::size_t completed = 0;
      for (std::size_t i = 0; i < local.size(); ++i) {
        while (!start(region_.page(local[i]), remote_ + remote[i] * map_.page_size(), &contexts_[i])) {
          completed += fabric_.poll();
        }
      }
      while (completed < local.size()) {
        completed += fabric_.poll();
      }
    });
  }

  [[nodiscard]] std::string path() const override { return fabric_.provider(); }

 private:
  /// @return false where the queue is full.
  bool start(std::span<std::byte> page, std::uint64_t remote, fi_context* context) {
    void* descriptor = fi_mr_desc(fabric_.memory());
    const auto result =
        reads_ ? fi_read(fabric_.endpoint(), page.data(), page.size(), descriptor, peer_, remote, key_, context)
               : fi_write(fabric_.endpoint(), page.data(), page.size(), descriptor, peer_, remote, key_, context);
    if (result == -FI_EAGAIN) {
      return false;
    }
    check(result, reads_ ? "fi_read" : "fi_write");
    return true;
  }

  const PageMap& map_;
  const Region& region_;
  bool reads_;
  Fabric fabric_;
  std::uint64_t remote_;
  std::uint64_t key_;
  std::vector<fi_context> contexts_;
  fi_addr_t peer_ = FI_ADDR_UNSPEC;
};

class FabricTarget final : public Target {
 public:
  explicit FabricTarget(const Setup& setup)
      : fabric_(setup.region, setup.job.settings.at("provider"), setup.host, true) {
    std::vector<std::uint8_t> address(256);
    std::size_t size = address.size();
    check(fi_getname(&fabric_.endpoint()->fid, address.data(), &size), "fi_getname");
    address.resize(size);
    endpoint_ = {
        {"host", setup.host},
        {"address", address},
        {"key", fi_mr_key(fabric_.memory())},
        {"region", fabric_.addresses_are_virtual() ? reinterpret_cast<std::uintptr_t>(setup.region.data()) : 0}};
    thread_.start([this](const std::stop_token& stop) {
      while (!stop.stop_requested()) {
        static_cast<void>(fabric_.poll());
      }
    });
  }

  [[nodiscard]] Json endpoint() const override { return endpoint_; }

  void finish() override { thread_.finish(); }

 private:
  Fabric fabric_;
  Json endpoint_;
  ServingThread thread_;
};

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  std::string provider = "tcp;ofi_rxm";
  Program program;
  program.name = "libfabric_bench";
  program.description = "Moves batches of pages with libfabric's RMA operations.";
  program.operations = {"write", "read"};
  program.add_options = [&](CLI::App& app) {
    app.add_option("--provider", provider, "As fi_info names it")->capture_default_str();
  };
  program.configure = [&](Job& job) {
    job.variant = "libfabric " + provider;
    job.settings = {{"provider", provider}, {"version", fi_version()}};
  };
  use_halves<FabricInitiator, FabricTarget>(program);
  return run_program(program, argc, argv);
}
