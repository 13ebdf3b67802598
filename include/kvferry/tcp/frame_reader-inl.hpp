// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <kvferry/tcp/frame_reader.hpp>

#include <algorithm>
#include <array>
#include <cstring>

namespace kvferry::inline KVFERRY_ABI::tcp {
inline namespace internal {

/// Descriptors are received in portions, the first one of this many and each further one as large as all before, so
/// that memory grows with what a peer sends, not with what it announces.
inline constexpr std::size_t descriptor_portion = 4096;
/// A frame may have a million descriptors; what an idle connection keeps is enough for the usual ones.
inline constexpr std::size_t entries_kept = 1024;

template <class Entry>
void release_excess(std::vector<Entry>& entries) {
  if (entries.capacity() > entries_kept) {
    std::vector<Entry>().swap(entries);
  }
}

}  // namespace internal

KVFERRY_INLINE std::size_t FrameReader::prepare(std::span<iovec> out, std::size_t max_bytes) {
  if (discard_ != 0) {
    return 0;
  }
  std::size_t count = 0;
  std::size_t i = head_;
  for (; !by_buffer_ && i < destinations_.size() && count + 1 < out.size() && max_bytes != 0; ++i) {
    out[count] = destinations_[i];
    out[count].iov_len = std::min(out[count].iov_len, max_bytes);
    max_bytes -= out[count].iov_len;
    ++count;
  }
  const bool whole = by_buffer_ || (i == destinations_.size() && (count == 0 || max_bytes != 0));
  if (whole) {
    // The buffer holds the beginning of a header, and has room for the rest of it.
    if (begin_ != 0) {
      std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
      end_ -= begin_;
      begin_ = 0;
    }
    out[count++] = {buffer_.data() + end_, buffer_.size() - end_};
  }
  return count;
}

KVFERRY_INLINE std::size_t FrameReader::prepare_page(std::span<iovec> out) {
  if (discard_ != 0 || head_ == destinations_.size()) {
    return prepare(out, 1);
  }
  out.front() = destinations_[head_];
  out.front().iov_len = std::min(out.front().iov_len, left_on_page(out.front().iov_base));
  return 1;
}

KVFERRY_INLINE std::error_code FrameReader::commit(std::size_t count, FrameSink& sink) {
  progress_.bytes += count;
  if (discard_ != 0) {
    discard_ -= count;
  } else if (by_buffer_) {
    end_ += count;
  } else {
    std::size_t wanted = 0;
    for (std::size_t i = head_; i < destinations_.size() && wanted < count; ++i) {
      wanted += destinations_[i].iov_len;
    }
    const std::size_t direct = std::min(wanted, count);
    advance_destinations(direct);
    end_ += count - direct;
  }
  return advance(sink);
}

KVFERRY_INLINE void FrameReader::advance_destinations(std::size_t count) {
  while (count != 0) {
    iovec& piece = destinations_[head_];
    const std::size_t part = std::min(piece.iov_len, count);
    piece.iov_base = static_cast<std::byte*>(piece.iov_base) + part;
    piece.iov_len -= part;
    count -= part;
    if (piece.iov_len == 0) {
      ++head_;
    }
  }
  while (head_ < destinations_.size() && destinations_[head_].iov_len == 0) {
    ++head_;
  }
}

KVFERRY_INLINE bool FrameReader::fill_from_buffer(FrameSink& sink) {
  advance_destinations(0);
  if (state_ == State::payload && head_ < destinations_.size() && begin_ != end_ &&
      !copy_payload_from_buffer(sink)) {
    (void)destination_failed();
  }
  const std::size_t thrown = std::min(discard_, end_ - begin_);
  discard_ -= thrown;
  begin_ += thrown;
  while (head_ < destinations_.size() && begin_ != end_) {
    iovec& piece = destinations_[head_];
    const std::size_t part = std::min(piece.iov_len, end_ - begin_);
    std::memcpy(piece.iov_base, buffer_.data() + begin_, part);
    begin_ += part;
    advance_destinations(part);
  }
  return destinations_full();
}

/// The memory may be gone by now, so it isn't the CPU that copies there, unless it can't be gone.
KVFERRY_INLINE bool FrameReader::copy_payload_from_buffer(FrameSink& sink) {
  std::array<iovec, 64> pieces;
  while (head_ < destinations_.size() && begin_ != end_) {
    std::size_t count = 0;
    std::size_t bytes = 0;
    for (std::size_t i = head_; i < destinations_.size() && count < pieces.size() && bytes < end_ - begin_; ++i) {
      pieces[count] = destinations_[i];
      pieces[count].iov_len = std::min(pieces[count].iov_len, end_ - begin_ - bytes);
      bytes += pieces[count++].iov_len;
    }
    const auto destinations = std::span(pieces).first(count);
    if (sink.surely_there(destinations)) {
      const std::byte* from = buffer_.data() + begin_;
      for (const iovec& piece : destinations) {
        std::memcpy(piece.iov_base, from, piece.iov_len);
        from += piece.iov_len;
      }
    } else if (!buffer_.copy_to(destinations, begin_, bytes)) {
      return false;
    }
    begin_ += bytes;
    advance_destinations(bytes);
  }
  return true;
}

KVFERRY_INLINE std::error_code FrameReader::advance(FrameSink& sink) {
  for (;;) {
    if (state_ == State::header) {
      if (end_ - begin_ < sizeof(FrameHeader)) {
        return {};
      }
      std::memcpy(&frame_.header, buffer_.data() + begin_, sizeof(FrameHeader));
      begin_ += sizeof(FrameHeader);
      if (const auto ec = sink.check_header(frame_.header)) {
        return ec;
      }
      if (const auto ec = enter(State::descriptors, sink)) {
        return ec;
      }
    }
    if (state_ == State::trailer) {
      if (end_ - begin_ < sizeof(FrameTrailer)) {
        return {};
      }
      std::memcpy(&frame_.trailer, buffer_.data() + begin_, sizeof(FrameTrailer));
      begin_ += sizeof(FrameTrailer);
    } else if (!fill_from_buffer(sink)) {
      return {};
    }
    std::error_code ec;
    switch (state_) {
      case State::header: break;
      case State::descriptors:
        if (frame_.descriptors.size() < frame_.header.count && !frame_.overfull) {
          want_descriptors(sink);
        } else {
          ec = enter(frame_.header.references != 0 ? State::references : State::payload, sink);
        }
        break;
      case State::references: ec = enter(State::payload, sink); break;
      case State::payload: ec = enter(State::notification, sink); break;
      case State::notification:
        if (frame_.header.checksums != 0) {
          ec = enter(State::checksums, sink);
          break;
        }
        [[fallthrough]];
      case State::checksums:
        if (has_trailer(frame_.header)) {
          ec = enter(State::trailer, sink);
          break;
        }
        [[fallthrough]];
      case State::trailer:
        ++progress_.frames;
        ec = sink.end_frame(frame_);
        state_ = State::header;
        release_excess(frame_.descriptors);
        release_excess(frame_.references);
        release_excess(destinations_);
        destinations_.clear();
        head_ = 0;
        break;
    }
    if (ec) {
      return ec;
    }
  }
}

KVFERRY_INLINE void FrameReader::want_descriptors(FrameSink& sink) {
  const std::size_t have = frame_.descriptors.size();
  const std::size_t rest = frame_.header.count - have;
  const std::size_t portion = std::min(rest, std::max(have, descriptor_portion));
  if (have != 0 && !sink.take_memory(portion * sizeof(Descriptor))) {
    frame_.overfull = true;
    std::vector<Descriptor>().swap(frame_.descriptors);
    destinations_.clear();
    head_ = 0;
    discard_ = rest * sizeof(Descriptor);
    return;
  }
  frame_.descriptors.reserve(have + portion);
  frame_.descriptors.resize(have + portion);
  destinations_.assign(1, {frame_.descriptors.data() + have, portion * sizeof(Descriptor)});
  head_ = 0;
}

KVFERRY_INLINE std::error_code FrameReader::enter(State state, FrameSink& sink) {
  state_ = state;
  destinations_.clear();
  head_ = 0;
  switch (state) {
    case State::header:
    case State::trailer: break;
    case State::descriptors:
      frame_.trailer = {};
      frame_.unwritable = false;
      frame_.unreadable = false;
      frame_.hung_up = false;
      frame_.overfull = false;
      frame_.checksums.clear();
      frame_.descriptors.clear();
      if (frame_.header.count != 0) {
        want_descriptors(sink);
      }
      break;
    case State::references:
      frame_.references.resize(frame_.header.references);
      destinations_.assign(1, {frame_.references.data(), frame_.references.size() * sizeof(Reference)});
      break;
    case State::payload: {
      if (const auto ec = sink.begin_payload(frame_, destinations_)) {
        return ec;
      }
      progress_.pieces += destinations_.size();
      if (frame_.header.references != 0) {
        return fetch_payload(sink);
      }
      // A read's payload_bytes are asked for, not sent.
      if (destinations_.empty() && frame_.header.type != FrameType::read) {
        discard_ = static_cast<std::size_t>(frame_.header.payload_bytes);
      }
      break;
    }
    case State::notification:
      frame_.notification.resize(frame_.header.notification_bytes);
      if (!frame_.notification.empty()) {
        destinations_.assign(1, {frame_.notification.data(), frame_.notification.size()});
      }
      break;
    case State::checksums:
      frame_.checksums.resize(frame_.header.checksums);
      destinations_.assign(1, {frame_.checksums.data(), frame_.checksums.size() * sizeof(Checksum)});
      break;
  }
  return {};
}

KVFERRY_INLINE std::error_code FrameReader::fetch_payload(FrameSink& sink) {
  std::error_code ec;
  if (!destinations_.empty()) {
    ec = sink.fetch(frame_, destinations_);
    progress_.fetched += frame_.header.payload_bytes;
  }
  destinations_.clear();
  return ec;
}

KVFERRY_INLINE bool FrameReader::destination_failed() {
  if (state_ != State::payload || head_ == destinations_.size()) {
    return false;
  }
  frame_.unwritable = true;
  abandon_payload();
  return true;
}

KVFERRY_INLINE void FrameReader::abandon_payload() {
  if (state_ == State::payload) {
    for (std::size_t i = head_; i < destinations_.size(); ++i) {
      discard_ += destinations_[i].iov_len;
    }
    destinations_.clear();
    head_ = 0;
  }
}

}  // namespace kvferry::tcp
