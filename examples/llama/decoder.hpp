// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/bind_executor.hpp>
#include <asio/io_context.hpp>

#include <deque>
#include <iostream>
#include <optional>
#include <utility>

#include "message.hpp"

namespace handover {

/// Fetches the KV caches of prompts that prefillers have computed, and computes their answers, all at a time.
class Decoder {
 public:
  Decoder(Engine& engine, kvferry::TcpOptions options)
      : engine_(engine), slots_(engine.sequences()), regions_(options.regions), channel_(std::move(options)) {
    listen();
    watch();
    std::cout << "decode waits at " << channel_.peer_init_url() << ", data port " << channel_.data_port() << std::endl;
  }

  /// Computes the next token of each prompt that is here, again and again, and looks in between at what has come.
  /// @return if `once`, when a prefiller is gone: how many of its prompts were under way.
  std::size_t run(bool once) {
    while (!once || !dropped_) {
      std::vector<Engine::Input> inputs;
      for (std::uint32_t i = 0; i < slots_.size(); ++i) {
        const Slot& slot = slots_[i];
        if (slot.done != 0) inputs.push_back({i, slot.cache.count + slot.done - 1, slot.cache.token, true});
      }
      const Tokens next = engine_.compute(inputs);
      for (std::size_t i = 0; i < next.size(); ++i) {
        Slot& slot = slots_[inputs[i].sequence];
        slot.cache.token = next[i];
        const auto now = steady_clock::now();
        const Message token{Kind::token, slot.cache.prompt, 0, 0, slot.done, 0, 0, next[i], 0, now};
        // A peer that can't be told is gone, and that is news of its own.
        channel_.async_notify(slot.peer, bytes_of(token), {}, [](std::error_code) {});
        if (++slot.done == slot.cache.length) free(slot);
      }
      inputs.empty() ? loop_.run_one() : loop_.poll();
    }
    return *dropped_;
  }

 private:
  /// A sequence, and the prompt that it is for.
  struct Slot {
    std::string peer;  ///< Empty: free.
    Message cache;     ///< Of kind `rows` until all of them are computed. Then with the last token of the answer.
    std::uint32_t parts = 0;  ///< Of the cache, fetched.
    std::uint32_t done = 0;   ///< Tokens of the answer; 0 until the cache is here.
    std::uint32_t reads = 0;  ///< Under way.
    bool lost = false;        ///< The peer is gone.
  };
  /// Where bytes are, and where they are to be.
  struct Fetch {
    std::vector<kvferry::MutableBuffer> objects;
    std::vector<kvferry::RemoteRange> ranges;
    int tries = 0;
  };

  void listen() {
    channel_.async_receive_notification({}, asio::bind_executor(loop_, [this](auto, const kvferry::Notification& note) {
                                          listen();
                                          take(note.peer_id, message_of(note));
                                        }));
  }
  void watch() {
    channel_.async_wait_peer_event({}, asio::bind_executor(loop_, [this](auto, const kvferry::PeerEvent& event) {
                                     watch();
                                     if (event.kind == kvferry::PeerEventKind::gone) drop(event);
                                   }));
  }

  /// Fetches what a prefiller has announced into the slot of its prompt.
  void take(const std::string& peer, const Message& message) {
    if (!channel_.remote_xfer_handler_exists(peer)) return;  // it was gone before this was looked at
    const auto same = [&](const Slot& slot) { return slot.peer == peer && slot.cache.prompt == message.prompt; };
    auto slot = std::ranges::find_if(slots_, same);
    if (slot == slots_.end()) slot = std::ranges::find(slots_, "", &Slot::peer);
    if (slot == slots_.end()) {
      waiting_.emplace_back(peer, message);
      return;
    }
    slot->peer = peer;
    slot->cache.prompt = message.prompt;
    Fetch fetch;
    bool fits = message.count + message.length <= engine_.size() && message.token >= 0 &&
                message.token < engine_.vocabulary() && (message.kind == Kind::rows || message.length > 1);
    const auto add = [&](std::size_t region, std::size_t from, std::size_t size) {
      fits = fits && region < regions_.size() && from + size <= regions_[region].page_size;
      if (!fits) return;
      fetch.objects.emplace_back(page_of(*slot, region).subspan(from, size));
      const std::size_t offset = message.prompt * regions_[region].page_size + from;
      fetch.ranges.push_back(kvferry::RemoteRange::contiguous(static_cast<std::uint32_t>(region), offset, size));
    };
    const std::size_t tensors = engine_.tensors.size();
    const auto rows = [&](std::size_t tensor) {
      const std::size_t bytes = tensor < tensors ? engine_.tensors[tensor]->nb[1] : 0;
      add(tensor, message.first * bytes, message.count * bytes);
    };
    if (message.kind == Kind::rows) rows(message.tensor);
    if (message.kind == Kind::state) add(tensors, 0, message.bytes);
    for (std::size_t i = 0; message.kind == Kind::inplace && i < tensors; ++i) rows(i);
    if (!fits) return refuse(*slot, "what it announces doesn't fit");
    if (message.kind != Kind::rows) slot->cache = message;
    fetch.objects.empty() ? start_if_complete(*slot) : read(*slot, std::move(fetch));
  }

  void read(Slot& slot, Fetch fetch) {
    ++slot.reads;
    const auto done = [this, &slot, fetch](std::error_code error, std::size_t) mutable {
      --slot.reads;
      if (slot.lost) return slot.reads == 0 ? free(slot) : void();
      if (error == kvferry::errc::checksum_mismatch && ++fetch.tries < 3) {
        std::cerr << "decode: a checksum differs, fetched again from " << slot.peer << std::endl;
        return read(slot, std::move(fetch));
      }
      if (error) return refuse(slot, error.message());
      ++slot.parts;
      start_if_complete(slot);
    };
    channel_.async_batched_read(fetch.objects, {.peer_id = slot.peer, .remote_ranges = fetch.ranges},
                                asio::bind_executor(loop_, done));
  }

  void start_if_complete(Slot& slot) {
    if (slot.cache.kind == Kind::rows || slot.parts != slot.cache.parts) return;
    const auto sequence = static_cast<std::uint32_t>(&slot - slots_.data());
    if (slot.cache.kind != Kind::state) {
      engine_.claim(sequence, slot.cache.count);
    } else if (!engine_.load(sequence, page_of(slot, engine_.tensors.size()).first(slot.cache.bytes))) {
      return refuse(slot, "llama.cpp doesn't take its state");
    }
    slot.done = 1;
  }

  [[nodiscard]] std::span<std::byte> page_of(const Slot& slot, std::size_t region) const {
    const kvferry::MemoryRegion& all = regions_[region];
    return {all.data + static_cast<std::size_t>(&slot - slots_.data()) * all.page_size, all.page_size};
  }

  void refuse(const Slot& slot, const std::string& why) {
    std::cerr << "decode: " << slot.peer << ": " << why << std::endl;
    channel_.disconnect(slot.peer);
  }
  void drop(const kvferry::PeerEvent& gone) {
    dropped_ = 0;
    std::erase_if(waiting_, [&](const auto& one) { return one.first == gone.peer_id; });
    for (Slot& slot : slots_) {
      if (slot.peer != gone.peer_id) continue;
      ++*dropped_;
      slot.lost = true;
      if (slot.reads == 0) free(slot);
    }
    std::cerr << "decode: " << gone.peer_id << " is gone (" << gone.cause.message() << "), " << *dropped_
              << " of its prompts were under way" << std::endl;
  }
  void free(Slot& slot) {
    engine_.forget(static_cast<std::uint32_t>(&slot - slots_.data()));
    slot = {};
    for (const auto& [peer, message] : std::exchange(waiting_, {})) take(peer, message);
  }

  Engine& engine_;
  std::vector<Slot> slots_;
  const std::vector<kvferry::MemoryRegion> regions_;
  std::deque<std::pair<std::string, Message>> waiting_;  ///< For a free slot.
  std::optional<std::size_t> dropped_;
  asio::io_context loop_;
  kvferry::TcpTransferChannel channel_;
};

}  // namespace handover
