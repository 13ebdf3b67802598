// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <system_error>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>
#include <kvferry/tcp/frame.hpp>
#include <kvferry/tcp/read_ahead.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

/// Decides about frames as they come in. An error from any function means that the peer broke the protocol.
class FrameSink {
 public:
  virtual ~FrameSink() = default;
  /// A header has arrived: checks the fields that determine memory, before any is allocated.
  [[nodiscard]] virtual std::error_code check_header(const FrameHeader& header) = 0;
  /// The frame's descriptors are about to take up so many bytes more than a usual frame's. @return false to have all of
  /// them thrown away: see `Frame::overfull`.
  [[nodiscard]] virtual bool take_memory(std::size_t bytes) {
    (void)bytes;
    return true;
  }
  /// Descriptors have arrived: appends the payload's destinations, `header.payload_bytes` in all, or nothing to have it
  /// thrown away.
  [[nodiscard]] virtual std::error_code begin_payload(Frame& frame, std::vector<iovec>& scatter) = 0;
  /// The payload is in the sender's memory: fetches it. Reports failures in the frame.
  [[nodiscard]] virtual std::error_code fetch(Frame& frame, std::span<const iovec> destinations) {
    (void)frame;
    (void)destinations;
    return errc::protocol_violation;
  }
  /// Whether all of this memory certainly exists, so that the CPU may write to it.
  [[nodiscard]] virtual bool surely_there(std::span<const iovec> pieces) {
    (void)pieces;
    return false;
  }
  /// All of the frame has arrived.
  [[nodiscard]] virtual std::error_code end_frame(Frame& frame) = 0;
};

/// Takes a connection's bytes apart into frames. Payload goes from the kernel straight to its destination: a read asks
/// for the destinations and, behind them, for the next header, so that a stream of frames needs no read for headers
/// alone.
///
/// Only bytes within `read_ahead` bytes of a header are copied: less than a hundredth of a full frame of 1 MiB. A
/// shorter read for the header would cost one more system call for each frame, which takes longer.
class KVFERRY_EXPORT FrameReader {
 public:
  /// The header and descriptors of 256 pages, or those of one page and the 4 KiB that it has.
  static constexpr std::size_t read_ahead = 4608;

  /// @param by_buffer all bytes go through the buffer, because it is the CPU that brings them, and destinations may be gone.
  explicit FrameReader(ReadAhead buffer = ReadAhead::unprotected(read_ahead), bool by_buffer = false)
      : by_buffer_(by_buffer), buffer_(std::move(buffer)) {}

  /// Fills `out` with the destinations of the socket's next bytes, at most `max_bytes` besides the read-ahead.
  /// @return the number of pieces of `out` used; 0 if the next bytes are to be thrown away: see `discardable`.
  std::size_t prepare(std::span<iovec> out, std::size_t max_bytes);

  /// The same, but at most the first of these pieces, and no more of it than lies on one page of memory.
  std::size_t prepare_page(std::span<iovec> out);

  /// See `ReadAhead::can_read`.
  [[nodiscard]] bool can_read(std::span<const iovec> pieces) const noexcept { return buffer_.can_read(pieces); }

  /// Whether the pieces of `prepare` include memory that isn't this connection's own, and so may be missing.
  [[nodiscard]] bool wants_payload() const noexcept {
    return !by_buffer_ && state_ == State::payload && head_ != destinations_.size();
  }

  /// How many of the next bytes have no destination.
  [[nodiscard]] std::size_t discardable() const noexcept { return discard_; }

  /// Reports that `count` bytes were read into the pieces of `prepare` (or were thrown away).
  [[nodiscard]] std::error_code commit(std::size_t count, FrameSink& sink);

  /// Whether some of a frame has come, and not all of it.
  [[nodiscard]] bool within_frame() const noexcept { return state_ != State::header || begin_ != end_; }
  /// How much has come since the connection began.
  struct Progress {
    std::uint64_t frames = 0;
    std::uint64_t bytes = 0;
    std::uint64_t pieces = 0;   ///< Of memory that payload was for.
    std::uint64_t fetched = 0;  ///< Bytes that were fetched from the sender's memory.
  };
  [[nodiscard]] const Progress& progress() const noexcept { return progress_; }

  /// Has the rest of the payload that is being received thrown away: its destinations are not touched any more.
  void abandon_payload();
  /// The first of the destinations can't be written. @return false if it is no payload's.
  [[nodiscard]] bool destination_failed();

 private:
  enum class State { header, descriptors, references, payload, notification, checksums, trailer };

  [[nodiscard]] std::error_code advance(FrameSink& sink);
  [[nodiscard]] bool fill_from_buffer(FrameSink& sink);
  [[nodiscard]] bool copy_payload_from_buffer(FrameSink& sink);
  [[nodiscard]] std::error_code enter(State state, FrameSink& sink);
  void want_descriptors(FrameSink& sink);
  [[nodiscard]] std::error_code fetch_payload(FrameSink& sink);
  [[nodiscard]] bool destinations_full() const noexcept { return head_ == destinations_.size() && discard_ == 0; }
  void advance_destinations(std::size_t count);

  const bool by_buffer_;
  State state_ = State::header;
  Frame frame_;
  std::vector<iovec> destinations_;
  std::size_t head_ = 0;
  std::size_t discard_ = 0;
  ReadAhead buffer_;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
  Progress progress_;
};

}  // namespace kvferry::tcp
