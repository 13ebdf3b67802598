// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <asio/bind_cancellation_slot.hpp>
#include <asio/bind_executor.hpp>
#include <asio/cancellation_signal.hpp>
#include <asio/io_context.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <kvferry/error.hpp>

#include "model_target.hpp"

namespace kvferry::inline KVFERRY_ABI::model {

struct Counts {
  std::atomic<std::uint64_t> page_checks{0};
  std::atomic<std::uint64_t> succeeded{0};
  std::atomic<std::uint64_t> given_up{0};
  std::atomic<std::uint64_t> in_flight{0};
  std::atomic<std::uint64_t> fences{0};
  std::atomic<std::uint64_t> reads{0};
};

/// The first violation of the rules.
class Verdict {
 public:
  void broken(const std::string& rule) {
    const std::lock_guard lock(mutex_);
    if (first_.empty()) {
      first_ = rule;
    }
    failed_ = true;
  }
  [[nodiscard]] bool failed() const noexcept { return failed_; }
  [[nodiscard]] std::string first() const {
    const std::lock_guard lock(mutex_);
    return first_;
  }

 private:
  mutable std::mutex mutex_;
  std::string first_;
  std::atomic<bool> failed_{false};
};

/// The initiator's channel, which is closed and replaced by one with another id now and then.
class Source {
 public:
  struct Channel {
    std::string id;
    std::unique_ptr<BaseTransferChannel> channel;
  };

  Source(const TargetShape& shape, Target& target) : shape_(shape), target_(target) { replace(); }

  [[nodiscard]] std::shared_ptr<Channel> current() const {
    const std::lock_guard lock(mutex_);
    return current_;
  }

  /// Opens a channel, and then closes the one before it, with work in flight.
  void replace() {
    auto next = std::make_shared<Channel>();
    next->id = "writer-" + std::to_string(++number_);
    ChannelOptions options;
    options.io_threads = 2;
    next->channel = make_source_channel(shape_, std::move(options));
    std::error_code ignored;
    next->channel->lazy_init_peer_connection(next->id, "target", target_.url(), {}, {}, ignored);
    std::shared_ptr<Channel> before;
    {
      const std::lock_guard lock(mutex_);
      before = std::exchange(current_, std::move(next));
    }
    if (before) {
      before->channel->close();
    }
  }

 private:
  const TargetShape shape_;
  Target& target_;
  std::uint64_t number_ = 0;
  mutable std::mutex mutex_;
  std::shared_ptr<Channel> current_;
};

/// A thread that writes and reads the pages `[first, first + count)`, which nobody else does, one operation after the
/// other's end, and checks what lies in them.
///
/// The rules: after a write that succeeded each of its pages holds its number, whole, until the next one is started.
/// After one that was given up nothing changes until the next one is started, unless its error says that bytes may still
/// land; then that holds from the next end on, or from the target's fence. After a fence nothing of what was started before it
/// changes a page, whether or not it has ended.
class Writer {
 public:
  Writer(const TargetShape& shape, const SharedPages& pages, Target& target, std::mutex& target_mutex, Source& source,
         Verdict& verdict, Counts& counts, std::size_t first, std::size_t count, std::uint64_t seed)
      : shape_(shape),
        pages_(pages),
        target_(target),
        target_mutex_(target_mutex),
        source_(source),
        verdict_(verdict),
        counts_(counts),
        first_(first),
        random_(seed),
        known_(count),
        how_(count),
        buffers_(2 * count * shape.page_bytes) {
    for (std::size_t i = 0; i < count; ++i) {
      known_[i] = snapshot(i);
    }
  }

  void run(const std::function<bool()>& goes_on) {
    while (goes_on() && !verdict_.failed()) {
      if (chance(15)) {
        read();
      } else {
        write();
      }
    }
  }

 private:
  [[nodiscard]] bool chance(unsigned percent) { return random_() % 100 < percent; }
  [[nodiscard]] std::size_t words() const { return shape_.page_bytes / sizeof(Word); }
  [[nodiscard]] const Word* page(std::size_t index) const {
    return reinterpret_cast<const Word*>(pages_.data() + (first_ + index) * shape_.page_bytes);
  }
  [[nodiscard]] MutableBuffer buffer(std::size_t index) {
    return MutableBuffer(buffers_).subspan(index * shape_.page_bytes, shape_.page_bytes);
  }
  [[nodiscard]] std::vector<Word> snapshot(std::size_t index) const {
    return {page(index), page(index) + words()};
  }

  void write() {
    const std::size_t most = known_.size();
    const std::size_t count = 1 + random_() % most;
    std::vector<std::size_t> named(most);
    for (std::size_t i = 0; i < most; ++i) {
      named[i] = i;
    }
    std::ranges::shuffle(named, random_);
    named.resize(count);
    if (chance(20)) {
      named.push_back(named[random_() % count]);  // the later object is to win
    }
    const auto used = source_.current();
    if (!unsure_of_.empty() && unsure_of_ != used->id) {
      fence(unsure_of_);  // that channel connects no more: nobody but the target can be sure
    }
    check_unchanged();
    std::vector<ConstBuffer> objects;
    std::vector<std::uint64_t> indexes;
    std::vector<Word> numbers(most);
    for (std::size_t i = 0; i < named.size(); ++i) {
      const Word number = ++last_number_;
      const MutableBuffer bytes = buffer(i);
      std::fill_n(reinterpret_cast<Word*>(bytes.data()), words(), number);
      objects.emplace_back(bytes);
      indexes.push_back(first_ + named[i]);
      numbers[named[i]] = number;
    }
    // Fenced while it is under way, or waits for a connection.
    std::vector<std::pair<std::size_t, std::vector<Word>>> fenced;
    const auto fence_and_look = [&] {
      fence(used->id);
      for (const std::size_t index : named) {
        fenced.emplace_back(index, snapshot(index));
      }
    };
    const std::error_code error = run_one(*used->channel, TransferKind::write, objects, {}, indexes,
                                          chance(5) ? std::function<void()>(fence_and_look) : nullptr);
    for (const auto& [index, words_then] : fenced) {
      ++counts_.page_checks;
      if (!std::equal(words_then.begin(), words_then.end(), page(index))) {
        say("page ", first_ + index, " held ", words_then.front(), " when a fence had ended, and then ", *page(index));
      }
    }
    if (!error) {
      ++counts_.succeeded;
      unsure_of_.clear();
      for (const std::size_t index : named) {
        ++counts_.page_checks;
        if (const auto* other = std::find_if(page(index), page(index) + words(),
                                             [&](Word word) { return word != numbers[index]; });
            other != page(index) + words()) {
          say("a write of number ", numbers[index], " succeeded, and page ", first_ + index, " holds ", *other);
        }
        known_[index] = std::vector<Word>(words(), numbers[index]);
        how_[index] = "succeeded";
      }
      return;
    }
    ++counts_.given_up;
    if (error == condition::may_still_land) {
      ++counts_.in_flight;
      unsure_of_ = used->id;
      if (chance(50)) {
        for (const std::size_t index : named) {
          known_[index].reset();
        }
        return;
      }
      fence(used->id);
    }
    for (const std::size_t index : named) {
      // Where an earlier one may still land, one that never got that far settles nothing.
      if (known_[index] || unsure_of_.empty()) {
        known_[index] = snapshot(index);
        how_[index] = "number " + std::to_string(numbers[index]) + " ended with " + error.message();
      }
    }
  }

  void read() {
    const std::size_t count = 1 + random_() % known_.size();
    std::vector<MutableBuffer> objects;
    std::vector<std::uint64_t> indexes;
    for (std::size_t i = 0; i < count; ++i) {
      objects.push_back(buffer(i));
      indexes.push_back(first_ + i);
    }
    check_unchanged();
    ++counts_.reads;
    const std::error_code error = run_one(*source_.current()->channel, TransferKind::read, {}, objects, indexes);
    const std::size_t bytes = count * shape_.page_bytes;
    for (std::size_t i = 0; !error && i < count; ++i) {
      ++counts_.page_checks;
      if (known_[i] && std::memcmp(objects[i].data(), known_[i]->data(), shape_.page_bytes) != 0) {
        say("a read of page ", first_ + i, " got ", *reinterpret_cast<const Word*>(objects[i].data()), ", and the page holds ",
            known_[i]->front());
      }
    }
    // Nothing reaches the buffers of what has ended, which the next operation uses for something else.
    const std::vector<std::byte> before(buffers_.begin(), buffers_.begin() + static_cast<std::ptrdiff_t>(bytes));
    check_unchanged();
    if (std::memcmp(before.data(), buffers_.data(), bytes) != 0) {
      say("a read that has ended changed a buffer");
    }
  }

  void check_unchanged() {
    for (std::size_t i = 0; i < known_.size(); ++i) {
      if (!known_[i]) {
        continue;
      }
      ++counts_.page_checks;
      const Word* const now = page(i);
      const auto [was, is] = std::mismatch(known_[i]->begin(), known_[i]->end(), now);
      if (was != known_[i]->end()) {
        say("page ", first_ + i, " held ", *was, " when the last write of it had ended (", how_[i], "), and now holds ", *is);
      }
    }
  }

  void fence(const std::string& id) {
    ++counts_.fences;
    {
      const std::lock_guard lock(target_mutex_);
      target_.fence(id);
    }
    unsure_of_.clear();
  }

  /// Starts a transfer, gives it up or not, and waits for its end.
  std::error_code run_one(BaseTransferChannel& channel, TransferKind kind, std::vector<ConstBuffer> sent,
                          std::vector<MutableBuffer> received, const std::vector<std::uint64_t>& indexes,
                          const std::function<void()>& meanwhile = nullptr) {
    asio::io_context context;
    asio::cancellation_signal signal;
    std::optional<std::error_code> outcome;
    TransferSpec spec{.peer_id = "target", .remote_indexes = indexes, .timeout = patience()};
    if (chance(25)) {
      spec.timeout = std::chrono::milliseconds(1 + random_() % 20);
    }
    auto request = kind == TransferKind::write ? BaseTransferChannel::make_request(kind, ConstObjects(std::move(sent)), spec)
                                               : BaseTransferChannel::make_request(kind, MutableObjects(std::move(received)), spec);
    channel.async_transfer(std::move(request),
                           asio::bind_cancellation_slot(
                               signal.slot(), asio::bind_executor(context, [&](std::error_code ec, std::size_t) {
                                 outcome = ec;
                               })));
    if (chance(30)) {
      context.run_for(std::chrono::microseconds(random_() % 3000));
      if (!outcome) {
        signal.emit(asio::cancellation_type::terminal);
      }
      context.restart();
    }
    if (meanwhile) {
      meanwhile();
    }
    const auto end = std::chrono::steady_clock::now() + 2 * patience();
    context.restart();
    context.run_until(end);
    if (!outcome) {
      std::cerr << "an operation has not ended long after its deadline; " << context.stopped() << std::endl;
      std::abort();  // its handler would use what is gone
    }
    return *outcome;
  }

  template <class... Parts>
  void say(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    verdict_.broken(text.str());
  }

  const TargetShape shape_;
  const SharedPages& pages_;
  Target& target_;
  std::mutex& target_mutex_;
  Source& source_;
  Verdict& verdict_;
  Counts& counts_;
  const std::size_t first_;
  std::mt19937_64 random_;
  /// The contents of each page since the last operation on it ended; nothing if they aren't certain.
  std::vector<std::optional<std::vector<Word>>> known_;
  std::vector<std::string> how_;
  std::vector<std::byte> buffers_;
  std::string unsure_of_;  ///< The id of a channel of which something may still land.
  Word last_number_ = 0;
};

}  // namespace kvferry::model
