// SPDX-License-Identifier: Apache-2.0
#include <CLI/CLI.hpp>

#include <kvferry/keyring.hpp>

#include <algorithm>
#include <optional>

#include "common/option_checks.hpp"
#include "common/program.hpp"
#include "transfer/channel_settings.hpp"
#include "transfer/sides.hpp"

namespace bench {
namespace {

/// The options as they stand on the command line.
struct RawOptions {
  ChannelSettings channel;
  bool async = false;
  bool sync = false;
  bool encrypt = false;
  std::size_t depth = 1;
  std::optional<std::size_t> threads;
  std::size_t peers = 1;
};

void add_options(CLI::App& app, RawOptions& raw) {
  app.add_option("--transport", raw.channel.transport, "What carries the pages")
      ->check(CLI::IsMember(transports()))
      ->capture_default_str();
  app.add_option("--depth", raw.depth, "Batches in flight, for each thread and peer; more than one: --async")
      ->type_name("N")
      ->check(between(1U, 1U << 16U))
      ->capture_default_str();
  app.add_option("--threads", raw.threads,
                 "The initiator's threads. --sync: for each peer, each moving batches of its own (default 1). --async: "
                 "each with an event loop that handlers run in (default 0: they run on the channel's I/O threads)")
      ->type_name("N")
      ->check(between(0, 1024));
  app.add_option("--peers", raw.peers, "Peers at once, each with a channel of its own in the target's process")
      ->type_name("N")
      ->check(between(1, 1024))
      ->capture_default_str();
  auto* async = app.add_flag("--async", raw.async, "Asynchronous calls, each started by the handler of the one before");
  app.add_flag("--sync", raw.sync, "Blocking calls (default)")->excludes(async);
  app.add_option("--poll", raw.channel.poll, "How I/O threads wait: never, adaptive, always (default: the library's)")
      ->check(CLI::IsMember({"never", "adaptive", "always"}).description(""));
  app.add_option("--spin", raw.channel.spin_us, "Microseconds that --poll adaptive polls for (default 50)")
      ->type_name("N");
  app.add_option("--lanes", raw.channel.lanes,
                 "Connections to a peer; with rdma, the first of this machine's rails (default: the library's)")
      ->type_name("N")
      ->check(between(1, 64));
  app.add_option("--queue-pairs", raw.channel.queue_pairs, "Queue pairs of each rail, of rdma (default: the library's)")
      ->type_name("N")
      ->check(between(1, 8));
  app.add_option("--io-threads", raw.channel.io_threads, "I/O threads of a channel (default: the library's)")
      ->type_name("N")
      ->check(between(1, 256));
  app.add_option("--send-buffer", raw.channel.send_buffer, "SO_SNDBUF (default: the library's)")
      ->type_name("SIZE")
      ->transform(size_with_unit());
  app.add_option("--receive-buffer", raw.channel.receive_buffer, "SO_RCVBUF (default: the library's)")
      ->type_name("SIZE")
      ->transform(size_with_unit());
  app.add_option("--congestion", raw.channel.congestion, "TCP's congestion control (default: the system's)")
      ->type_name("NAME");
  app.add_flag("--encrypt", raw.encrypt, "tcp: encrypted connections, with a key that is made for the run");
  app.add_flag("--checksums", raw.channel.checksums, "Objects are compared where they have landed");
  app.add_flag("--unregistered", raw.channel.unregistered, "The initiator's objects lie outside of every region");
  app.add_option("--receives-ahead", raw.channel.receives_ahead,
                 "sendrecv: how many batches of each stream the target has posted (default 4)")
      ->type_name("N")
      ->check(between(1, 1024));
}

void configure(const RawOptions& raw, Job& job) {
  ChannelSettings settings = raw.channel;
  settings.async = raw.async || raw.depth > 1;
  if (raw.sync && settings.async) {
    throw CLI::ValidationError("--sync", "a thread has one blocking call at a time: use --threads instead of --depth");
  }
  if (!settings.async && raw.threads == 0) {
    throw CLI::ValidationError("--threads", "blocking calls need a thread");
  }
  if (raw.encrypt && settings.transport != "tcp") {
    throw CLI::ValidationError("--encrypt", "only tcp encrypts");
  }
  if (raw.encrypt) {
    settings.key = kvferry::make_key_pair().secret_key.text();
  }
  if (settings.receives_ahead == 0) {
    settings.receives_ahead = 4;
  }
  job.depth = raw.depth;
  job.threads = raw.threads.value_or(settings.async ? 0 : 1);
  job.peers = raw.peers;
  job.streams_per_peer = settings.async ? raw.depth * std::max<std::size_t>(job.threads, 1) : job.threads;
  job.variant = "kvferry " + settings.transport + (settings.async ? " async" : "") +
                (settings.poll.empty() ? "" : " " + settings.poll) + (raw.encrypt ? " encrypted" : "") +
                (settings.checksums ? " checksums" : "");
  job.settings = settings;
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  RawOptions raw;
  Program program;
  program.name = "transfer_bench";
  program.description = "Moves batches of pages between two processes with kvferry, and says how fast that was.";
  program.operations = {"write", "read", "sendrecv"};
  program.add_options = [&](CLI::App& app) { add_options(app, raw); };
  program.configure = [&](Job& job) { configure(raw, job); };
  program.make_initiator = make_transfer_initiator;
  program.make_target = make_transfer_target;
  return run_program(program, argc, argv);
}
