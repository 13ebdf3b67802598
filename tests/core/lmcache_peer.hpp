// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdio>
#include <stdexcept>
#include <string>

#include <kvferry/config.hpp>

namespace kvferry::inline KVFERRY_ABI::test {

/// A run of lmcache_peer.py, which ends by itself at its own deadlines. Its complaints go to our standard error.
class LmcachePeer {
 public:
  explicit LmcachePeer(const std::string& arguments)
      : pipe_(::popen(
            ("'" KVFERRY_TEST_PYTHON "' '" KVFERRY_TEST_DATA_DIR "/core/lmcache_peer.py' " + arguments).c_str(), "r")) {
    if (pipe_ == nullptr) {
      throw std::runtime_error("cannot run " KVFERRY_TEST_PYTHON);
    }
  }
  LmcachePeer(const LmcachePeer&) = delete;
  LmcachePeer& operator=(const LmcachePeer&) = delete;
  ~LmcachePeer() { exit_status(); }

  std::string read_line() {
    std::array<char, 256> line{};
    const std::string text = std::fgets(line.data(), line.size(), pipe_) != nullptr ? line.data() : "";
    return text.substr(0, text.find('\n'));
  }

  int exit_status() {
    const int status = pipe_ != nullptr ? ::pclose(pipe_) : 0;
    pipe_ = nullptr;
    return status;
  }

 private:
  std::FILE* pipe_;
};

}  // namespace kvferry::test
