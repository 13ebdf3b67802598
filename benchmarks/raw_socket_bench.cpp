// SPDX-License-Identifier: Apache-2.0
// The throughput of plain sockets: a ceiling for every transfer library over TCP.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <asio/connect.hpp>
#include <asio/io_context.hpp>
#include <asio/read.hpp>
#include <asio/write.hpp>

#include <cstring>

#include "common/option_checks.hpp"
#include "common/program.hpp"
#include "common/serving_thread.hpp"
#include "raw/pump.hpp"

namespace bench {
namespace {

using asio::ip::tcp;

/// The first bytes of a connection: which of whose it is.
struct Hello {
  std::uint32_t stream = 0;
  std::uint32_t lane = 0;
};

class SocketInitiator final : public Initiator {
 public:
  SocketInitiator(const Setup& setup, const Json& endpoint) {
    const auto options = setup.job.settings.get<LaneOptions>();
    const auto to = tcp::resolver(context_).resolve(endpoint.at("host").get<std::string>(),
                                                    std::to_string(endpoint.at("port").get<int>()));
    for (std::uint32_t stream = 0; stream < setup.job.streams(); ++stream) {
      std::vector<Lane> lanes;
      for (std::uint32_t lane = 0; lane < options.lanes; ++lane) {
        tcp::socket socket(context_);
        asio::connect(socket, to);
        const Hello hello{stream, lane};
        asio::write(socket, asio::buffer(&hello, sizeof(hello)));
        lanes.emplace_back(std::move(socket), options, setup.region);
      }
      pumps_.emplace_back(setup, options, stream, false, std::move(lanes));
    }
  }

  void run(std::span<Stream> streams) override {
    run_in_threads(streams.size(), [&](std::size_t i) { pumps_[i].initiate(streams[i]); });
  }

  void finish() override { std::ranges::for_each(pumps_, &Pump::shut); }

 private:
  asio::io_context context_{1};
  std::vector<Pump> pumps_;
};

class SocketTarget final : public Target {
 public:
  explicit SocketTarget(const Setup& setup)
      : acceptor_(context_, *tcp::resolver(context_).resolve(setup.host, "0").begin()), host_(setup.host) {
    thread_.start([this, setup](const std::stop_token&) { serve(setup); });
  }

  [[nodiscard]] Json endpoint() const override {
    return {{"host", host_}, {"port", acceptor_.local_endpoint().port()}};
  }

  void finish() override { thread_.finish(); }

 private:
  void serve(const Setup& setup) {
    const auto options = setup.job.settings.get<LaneOptions>();
    std::vector<std::vector<std::optional<tcp::socket>>> sockets(setup.job.streams());
    std::ranges::for_each(sockets, [&](auto& lanes) { lanes.resize(options.lanes); });
    for (std::size_t i = 0; i < setup.job.streams() * options.lanes; ++i) {
      auto socket = acceptor_.accept();
      Hello hello;
      asio::read(socket, asio::buffer(&hello, sizeof(hello)));
      sockets.at(hello.stream).at(hello.lane) = std::move(socket);
    }
    run_in_threads(sockets.size(), [&](std::size_t stream) {
      std::vector<Lane> lanes;
      for (auto& socket : sockets[stream]) {
        lanes.emplace_back(std::move(socket.value()), options, setup.region);
      }
      Pump(setup, options, stream, true, std::move(lanes)).serve();
    });
  }

  asio::io_context context_{1};
  tcp::acceptor acceptor_;
  std::string host_;
  ServingThread thread_;
};

/// The options as they stand on the command line.
struct RawOptions {
  std::string mode = "polling";
  std::optional<std::string> wait;
  std::optional<std::size_t> step;
  std::optional<std::size_t> send_buffer;
  std::optional<std::size_t> receive_buffer;
  std::string io = "calls";
  LaneOptions lane;
};

void add_options(CLI::App& app, RawOptions& raw, Job& job) {
  app.add_option(
         "--mode", raw.mode,
         "blocking: calls that wait and take a whole batch each; polling: calls that don't wait, in steps of 1 MiB, "
         "with 4 MiB of socket buffers; the options below change either")
      ->check(CLI::IsMember({"blocking", "polling"}))
      ->capture_default_str();
  app.add_option("--wait", raw.wait, "How to wait: block, poll (always), adaptive (for --spin, then block)")
      ->check(CLI::IsMember({"block", "poll", "adaptive"}));
  app.add_option("--spin", raw.lane.spin_us, "Microseconds")->capture_default_str();
  app.add_option("--step", raw.step, "Bytes that a call moves at most; 0: no limit")
      ->transform(size_with_unit());
  app.add_option("--send-buffer", raw.send_buffer, "SO_SNDBUF; 0: the system's")
      ->transform(size_with_unit());
  app.add_option("--receive-buffer", raw.receive_buffer, "SO_RCVBUF; 0: the system's")
      ->transform(size_with_unit());
  app.add_option("--congestion", raw.lane.congestion,
                 "TCP's congestion control, like cubic or bbr (default: the system's)")
      ->type_name("NAME");
  app.add_option("--lanes", raw.lane.lanes, "Connections that each batch is spread over")
      ->check(between(1, 64))
      ->capture_default_str();
  app.add_option(
         "--io", raw.io,
         "calls: a system call each; ring: by an io_uring; ring-zero-copy: by an io_uring, out of registered memory. "
         "Rings are for --mode blocking with one lane")
      ->check(CLI::IsMember({"calls", "ring", "ring-zero-copy"}))
      ->capture_default_str();
  app.add_option("--depth", job.depth, "Batches in flight, for each thread")
      ->check(between(1, 1 << 16))
      ->capture_default_str();
  app.add_option("--threads", job.threads, "Threads on each side, each with connections and batches of its own")
      ->check(between(1, 256))
      ->capture_default_str();
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  RawOptions raw;
  Job threads;
  Program program;
  program.name = "raw_socket_bench";
  program.description = "Moves batches of pages over plain TCP sockets: what the system can do, without any library.";
  program.operations = {"write", "read"};
  program.add_options = [&](CLI::App& app) { add_options(app, raw, threads); };
  program.configure = [&](Job& job) {
    const bool polling = raw.mode == "polling";
    LaneOptions lane = raw.lane;
    lane.wait = raw.wait ? Json(*raw.wait).get<Wait>() : polling ? Wait::poll : Wait::block;
    lane.step = raw.step.value_or(polling ? std::size_t{1} << 20U : 0);
    const std::size_t usual_buffer = polling ? std::size_t{4} << 20U : 0;
    lane.send_buffer = raw.send_buffer.value_or(usual_buffer);
    lane.receive_buffer = raw.receive_buffer.value_or(usual_buffer);
    lane.io = Json(raw.io).get<Io>();
    if (lane.io != Io::calls && !has_ring()) {
      throw CLI::ValidationError("--io", "this program was built without liburing");
    }
    if (lane.io != Io::calls && !lane.blocking()) {
      throw CLI::ValidationError("--io", "a ring takes --mode blocking and one lane");
    }
    job.variant = "raw " + raw.mode + (lane.io == Io::calls ? "" : " " + raw.io);
    job.depth = threads.depth;
    job.threads = threads.threads;
    job.streams_per_peer = threads.threads;
    job.settings = lane;
  };
  use_halves<SocketInitiator, SocketTarget>(program);
  return run_program(program, argc, argv);
}
