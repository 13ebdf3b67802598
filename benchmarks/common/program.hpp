// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "job.hpp"
#include "page_map.hpp"
#include "region.hpp"
#include "result.hpp"
#include "stream.hpp"

namespace CLI {
class App;
}

namespace bench {

/// The half that moves the pages and is timed.
class Initiator {
 public:
  Initiator() = default;
  Initiator(const Initiator&) = delete;
  Initiator& operator=(const Initiator&) = delete;
  virtual ~Initiator() = default;

  /// Moves batches for every stream until each has reached its limit and nothing is in flight any more.
  virtual void run(std::span<Stream> streams) = 0;
  /// Called once after the last run: whatever the target needs in order to end.
  virtual void finish() {}
  /// How the bytes travel, for people.
  [[nodiscard]] virtual std::string path() const { return {}; }
  /// How full its adapter was kept, if it has one.
  [[nodiscard]] virtual std::optional<Window> window() const { return std::nullopt; }
};

/// The other half. Its work runs on threads of its own.
class Target {
 public:
  Target() = default;
  Target(const Target&) = delete;
  Target& operator=(const Target&) = delete;
  virtual ~Target() = default;

  /// The facts that the initiator needs in order to connect.
  [[nodiscard]] virtual Json endpoint() const = 0;
  /// Called when the initiator has been made, which means that it is connected.
  virtual void connected() {}
  /// Called after `Initiator::finish`: returns when nothing touches the region any more. @throws what went wrong.
  virtual void finish() {}
};

/// The parts of both halves of a job.
struct Setup {
  const Job& job;
  const PageMap& map;
  const Region& region;
  std::string host;  ///< Where the target listens.
};

/// A benchmark program: how the work is done. Everything else is the same for all of them.
struct Program {
  std::string name;
  std::string description;
  std::vector<std::string> operations{"write"};
  std::function<void(CLI::App&)> add_options = [](CLI::App&) {};
  /// Puts the program's own options into the job (variant, streams, settings). @throws CLI::ValidationError
  std::function<void(Job&)> configure = [](Job&) {};
  std::function<std::unique_ptr<Initiator>(const Setup&, const Json& endpoint)> make_initiator;
  /// Empty: there is no target, the initiator does everything in one process, and its region is the destination.
  std::function<std::unique_ptr<Target>(const Setup&)> make_target;
};

/// For programs whose halves are made of the setup, and the initiator of the target's endpoint besides.
template <class InitiatorHalf, class TargetHalf>
void use_halves(Program& program) {
  program.make_initiator = [](const Setup& setup, const Json& endpoint) {
    return std::make_unique<InitiatorHalf>(setup, endpoint);
  };
  program.make_target = [](const Setup& setup) { return std::make_unique<TargetHalf>(setup); };
}

/// The whole of a benchmark program's main function: parses the options, becomes the initiator (and starts the target) or
/// the target, runs and verifies each job, and reports.
int run_program(const Program& program, int argc, char** argv);

}  // namespace bench
