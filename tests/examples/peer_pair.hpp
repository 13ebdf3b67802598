// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "peer_process.hpp"

namespace kvferry_test {

inline Arguments operator+(Arguments left, const Arguments& right) {
  left.insert(left.end(), right.begin(), right.end());
  return left;
}

inline std::string program(std::string_view name) { return std::string(KVFERRY_EXAMPLES_DIR "/") + std::string(name); }

/// A decode peer that listens, on a port of its own.
class DecodeProcess : public PeerProcess {
 public:
  explicit DecodeProcess(const Arguments& arguments = {}) : PeerProcess(program("decode_peer"), arguments) {
    const auto line = wait_for_line(" listening on ");
    url_ = line.substr(line.rfind(' ') + 1);
  }

  [[nodiscard]] const std::string& url() const noexcept { return url_; }

 private:
  std::string url_;
};

class PrefillProcess : public PeerProcess {
 public:
  PrefillProcess(const std::string& url, const Arguments& arguments, Errors errors = Errors::pipe)
      : PeerProcess(program("prefill_peer"), Arguments{"--connect", url} + arguments, errors) {}
};

/// A prefill and a decode peer that both get `common`.
class PeerPair {
 public:
  explicit PeerPair(const Arguments& common, const Arguments& for_prefill = {}, const Arguments& for_decode = {})
      : decode(common + for_decode), prefill(decode.url(), common + for_prefill) {}

  DecodeProcess decode;
  PrefillProcess prefill;
};

/// The two peers, as run-peer-pair.sh runs them when it has built them.
class Exchange : public PeerProcess {
 public:
  Exchange(const Arguments& decode, const Arguments& prefill, const Arguments& first = {})
      : PeerProcess(KVFERRY_TEST_DATA_DIR "/../examples/peer_pair/exchange.sh",
                    first + Arguments{KVFERRY_EXAMPLES_DIR} + decode + Arguments{"--"} + prefill) {}
};

inline std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    lines.push_back(line);
  }
  return lines;
}

/// A peer's own lines on stderr, without those that spdlog writes there of kvferry.
inline std::vector<std::string> own_lines_of(const PeerProcess& peer) {
  auto lines = lines_of(peer.errors());
  std::erase_if(lines, [](const std::string& line) { return line.find("] [kvferry] [") != std::string::npos; });
  return lines;
}

/// A folder that goes with the test.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    auto name = (std::filesystem::temp_directory_path() / "kvferry-peer-pair-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) {
      throw std::runtime_error("cannot make a folder like " + name);
    }
    path_ = name;
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  [[nodiscard]] std::string file(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_file(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

}  // namespace kvferry_test
