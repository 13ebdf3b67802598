// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include <kvferry/testing/traits.hpp>
#include <kvferry/transfer_spec.hpp>

#ifdef KVFERRY_TESTING_THREAD_SANITIZED
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace kvferry::inline KVFERRY_ABI::testing {

/// While it lives, ThreadSanitizer does not look at what this thread reads and writes.
///
/// For memory that the peer's threads access for an operation of this side. A message tells this side that they have
/// finished. ThreadSanitizer doesn't see the order that messages make: not at all between processes, and within one
/// only up to the call that sends the message, whose own accesses it records later.
class UnwatchedAccess {
 public:
#ifdef KVFERRY_TESTING_THREAD_SANITIZED
  UnwatchedAccess() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~UnwatchedAccess() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  UnwatchedAccess() {}
  ~UnwatchedAccess() {}
#endif
  UnwatchedAccess(const UnwatchedAccess&) = delete;
  UnwatchedAccess& operator=(const UnwatchedAccess&) = delete;
};

/// Memory in a node's regions, which peers read and write. The functions of patterns.hpp access it unwatched. Converted
/// to a buffer it is ordinary memory.
class PeerMemory {
 public:
  explicit PeerMemory(MutableBuffer buffer) : buffer_(buffer) {}

  [[nodiscard]] std::byte* data() const { return buffer_.data(); }
  [[nodiscard]] std::size_t size() const { return buffer_.size(); }
  [[nodiscard]] PeerMemory first(std::size_t count) const { return PeerMemory(buffer_.first(count)); }

  operator MutableBuffer() const { return buffer_; }
  operator ConstBuffer() const { return buffer_; }

 private:
  MutableBuffer buffer_;
};

}  // namespace kvferry::testing
