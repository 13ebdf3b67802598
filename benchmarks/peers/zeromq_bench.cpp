// SPDX-License-Identifier: Apache-2.0
// The same work over ZeroMQ: a message of as many parts as there are pages for each batch. Sent without a copy; the receiver
// copies each part to its page, as ZeroMQ doesn't let it say where a message is to be received.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <zmq.hpp>

#include <cstring>
#include <stdexcept>

#include "common/program.hpp"
#include "common/serving_thread.hpp"

namespace bench {
namespace {

using Pages = std::span<const std::uint64_t>;

zmq::socket_t make_socket(zmq::context_t& context) {
  zmq::socket_t socket(context, zmq::socket_type::pair);
  socket.set(zmq::sockopt::sndhwm, 0);
  socket.set(zmq::sockopt::rcvhwm, 0);
  socket.set(zmq::sockopt::linger, 0);
  return socket;
}

void send_pages(zmq::socket_t& socket, const Region& region, Pages pages) {
  for (std::size_t i = 0; i < pages.size(); ++i) {
    const auto page = region.page(pages[i]);
    // The region outlives the context, so nothing is to be freed.
    zmq::message_t part(page.data(), page.size(), nullptr, nullptr);
    socket.send(part, i + 1 < pages.size() ? zmq::send_flags::sndmore : zmq::send_flags::none);
  }
}

/// @param part the first part, already received.
void receive_pages(zmq::socket_t& socket, zmq::message_t& part, const Region& region, Pages pages) {
  for (std::size_t i = 0; i < pages.size(); ++i) {
    if (i > 0) {
      static_cast<void>(socket.recv(part));
    }
    const auto page = region.page(pages[i]);
    if (part.size() != page.size() || part.more() != (i + 1 < pages.size())) {
      throw std::runtime_error(fmt::format("part {} of a batch has {} bytes", i, part.size()));
    }
    std::memcpy(page.data(), part.data(), page.size());
  }
}

class ZeroMqInitiator final : public Initiator {
 public:
  ZeroMqInitiator(const Setup& setup, const Json& endpoint)
      : map_(setup.map), region_(setup.region), reads_(setup.job.target_is_source()), socket_(make_socket(context_)) {
    socket_.connect(endpoint.at("url").get<std::string>());
  }

  void run(std::span<Stream> streams) override {
    run_blocking(streams, [this](std::size_t stream, std::uint64_t batch) {
      const auto pages = map_.initiator_pages(stream, batch);
      zmq::message_t answer;
      if (reads_) {
        socket_.send(zmq::str_buffer("r"), zmq::send_flags::none);
        static_cast<void>(socket_.recv(answer));
        receive_pages(socket_, answer, region_, pages);
      } else {
        send_pages(socket_, region_, pages);
        static_cast<void>(socket_.recv(answer));
      }
    });
  }

  void finish() override { socket_.send(zmq::message_t(), zmq::send_flags::none); }

 private:
  const PageMap& map_;
  const Region& region_;
  bool reads_;
  zmq::context_t context_;
  zmq::socket_t socket_;
};

class ZeroMqTarget final : public Target {
 public:
  explicit ZeroMqTarget(const Setup& setup) : socket_(make_socket(context_)) {
    socket_.bind(fmt::format("tcp://{}:*", setup.host));
    url_ = socket_.get(zmq::sockopt::last_endpoint);
    thread_.start([this, setup](const std::stop_token&) { serve(setup); });
  }

  [[nodiscard]] Json endpoint() const override { return {{"url", url_}}; }

  void finish() override { thread_.finish(); }

 private:
  void serve(const Setup& setup) {
    for (std::uint64_t batch = 0;; ++batch) {
      const auto pages = setup.map.target_pages(0, batch);
      zmq::message_t part;
      static_cast<void>(socket_.recv(part));
      if (part.size() == 0) {
        return;
      }
      if (setup.job.target_is_source()) {
        send_pages(socket_, setup.region, pages);
      } else {
        receive_pages(socket_, part, setup.region, pages);
        socket_.send(zmq::str_buffer("w"), zmq::send_flags::none);
      }
    }
  }

  zmq::context_t context_;
  zmq::socket_t socket_;
  std::string url_;
  ServingThread thread_;
};

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  Program program;
  program.name = "zeromq_bench";
  program.description = "Moves batches of pages over ZeroMQ's tcp transport.";
  program.operations = {"write", "read"};
  program.configure = [](Job& job) { job.variant = "zeromq"; };
  use_halves<ZeroMqInitiator, ZeroMqTarget>(program);
  return run_program(program, argc, argv);
}
