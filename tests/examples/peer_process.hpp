// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

#include <array>
#include <string>
#include <string_view>
#include <vector>

namespace kvferry_test {

using Arguments = std::vector<std::string>;

/// The url at the end of the line in which a program says where it waits.
inline std::string url_in(const std::string& line) { return line.substr(line.find("tcp://")); }

/// A program that was started, its output, and its end. Everything that waits has a deadline, and throws past it.
class PeerProcess {
 public:
  /// Where its stderr goes: as when it is run by a program, or by a person.
  enum class Errors { pipe, terminal };

  PeerProcess(std::string path, const Arguments& arguments, Errors errors = Errors::pipe);
  PeerProcess(const PeerProcess&) = delete;
  PeerProcess& operator=(const PeerProcess&) = delete;
  /// Kills it if it still runs.
  ~PeerProcess();

  void signal(int number) const;

  /// The first line, of stdout or stderr, that has this text in it.
  std::string wait_for_line(std::string_view text);

  /// Reads the rest and returns the exit code; 128 + n if signal n ended it.
  int wait_for_exit();

  [[nodiscard]] const std::string& output() const noexcept { return streams_[0].text; }
  [[nodiscard]] const std::string& errors() const noexcept { return streams_[1].text; }

 private:
  struct Stream {
    int fd = -1;
    std::string text;

    [[nodiscard]] std::string line_with(std::string_view part) const;
  };

  /// Reads what there is; waits for it. False once both streams have ended.
  bool read_more();

  std::string path_;
  pid_t pid_ = -1;
  int pidfd_ = -1;
  std::array<Stream, 2> streams_;
};

}  // namespace kvferry_test
