// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <system_error>
#include <unordered_map>
#include <vector>

#include <kvferry/kit/link.hpp>
#include <kvferry/kit/region_list.hpp>

#include <kvferry/kit/fifo.hpp>
#include <kvferry/kit/spare_nodes.hpp>
#include <kvferry/kit/striped_operation.hpp>
#include <kvferry/kit/tag_matcher.hpp>

#include <kvferry/tcp/checksums.hpp>
#include <kvferry/tcp/chunk.hpp>
#include <kvferry/tcp/frame.hpp>
#include <kvferry/tcp/frame_reader.hpp>
#include <kvferry/tcp/gather_queue.hpp>
#include <kvferry/tcp/peer_memory.hpp>

namespace kvferry::inline KVFERRY_ABI::tcp {

using kit::StripedOperation;

/// The protocol of one data connection, without the connection: bytes come in through `reader` and go out through
/// `out`. One thread at a time.
///
/// One-sided: `write` frames are placed and acknowledged by the peer's side of this class, `read` frames answered with
/// `read_data`. Paired: a recv is posted to the sender, which matches it with its sends by tag and then sends straight
/// into it, so that no byte of an object is ever received before its destination is known.
class KVFERRY_EXPORT LaneProtocol final : private FrameSink {
 public:
  /// @param buffer of at least `FrameReader::read_ahead` bytes.
  /// @param memory the way for payload outside of the connection; null: there is none.
  /// @param by_buffer see `FrameReader`.
  explicit LaneProtocol(std::shared_ptr<kit::LinkHost> host,
                        ReadAhead buffer = ReadAhead::unprotected(FrameReader::read_ahead),
                        std::shared_ptr<PeerMemory> memory = nullptr, bool by_buffer = false)
      : host_(std::move(host)),
        reader_(std::move(buffer), by_buffer),
        memory_(std::move(memory)),
        regions_(host_->local_regions()),
        told_regions_(host_->told_regions()),
        told_next_region_(told_regions_->next()) {}

  /// Takes objects `range` of an operation.
  void start(std::shared_ptr<StripedOperation> batch, ObjectRange range);

  /// Whether a stopped operation has waited in vain for all of its time: either it was sent and nothing has come in
  /// since, or nothing has come in or gone out although there was something to send.
  /// @param held_back whether the connection still holds bytes that were handed to it to be sent.
  [[nodiscard]] bool looks_dead(const kit::Operation& operation, kit::Clock::duration least_silence,
                                bool held_back) const;

  /// Ends an operation's part with the operation's stop cause: now, or when the peer has dealt with all that was sent of
  /// it: see `draining_since`.
  void stop(const kit::Operation& operation);

  /// The time since which the peer has not answered for a stopped operation. If there are several, the one that was
  /// stopped first counts. Nothing if there is none.
  [[nodiscard]] std::optional<kit::Clock::time_point> draining_since();
  [[nodiscard]] bool drains_nothing() const noexcept { return drains_.empty(); }

  /// Asks whether the peer lives: `received` calls `answered` when the peer has answered.
  void probe(std::function<void()> answered);

  /// Calls `done` when the peer has confirmed that the writes that it had started here have ended, or the connection is
  /// gone.
  void fence(std::function<void()> done);
  /// Whether the peer has asked that since the last call; then `answer_fence` has to be called once.
  [[nodiscard]] bool take_fence() noexcept { return std::exchange(fence_asked_, false); }
  /// The writes that were started on this side before the peer asked have ended.
  void answer_fence();

  /// Tells the peer of this side's regions that it doesn't know.
  void region_added();
  /// Tells the peer that a region is gone, which `LinkHost::local_regions` doesn't have any more, and calls `done` when
  /// nothing of the peer's can touch it here, or the connection is gone.
  void region_removed(std::uint32_t number, std::function<void()> done);

  /// Called when the peer has given the connection up: the rest of its writes in the socket is thrown away, because
  /// they have ended there. Its answers still count.
  void peer_gone();

  /// Called when the channel is being closed: later operations of the peer are ignored and not answered. They end with
  /// the connection.
  void leave() noexcept { leaving_ = true; }

  /// Whether nothing is under way here and nothing is left to say.
  [[nodiscard]] bool settled() const noexcept { return transfers_.empty() && control_.empty() && out_.empty(); }
  /// Whether, besides, no answer of the peer's is awaited, nor the rest of a frame.
  [[nodiscard]] bool quiet() const noexcept {
    return settled() && responses_.empty() && fences_.empty() && probes_.empty() && removed_.empty() &&
           !reader_.within_frame();
  }
  /// Whether something of this side's is under way, or was when the connection failed.
  [[nodiscard]] bool in_flight() const noexcept;

  /// The connection is gone: ends all parts with `cause`, later ones too. If the peer has not answered something that was
  /// sent of a part, the part's error is one for which `condition::may_still_land` holds. Needs no memory: without, there are
  /// no sentences.
  void fail(std::error_code cause, std::string why);

  /// The result of a part of a read that this side makes alone.
  struct Copied {
    std::size_t bytes = 0;  ///< 0: there is no such read.
    std::size_t pieces = 0;  ///< Of either side's memory.
    bool hung_up = false;   ///< The peer has hung up, so the bytes don't count. The reader finds the end behind the
                            ///< peer's last bytes.
    std::error_code failure = {};  ///< Likewise; the connection is of no use any more.
  };
  /// Copies the next part of a read of regions that this side reads by itself, up to a frame's bytes: nothing of it travels.
  [[nodiscard]] Copied copy_part();

  /// Adds bytes that are no frame to the outgoing queue.
  void say(std::span<const std::byte> bytes) { out_.add_copy(bytes); }
  /// Adds frames to the outgoing queue until it holds `enough` bytes or there is nothing more to send.
  void fill(std::size_t enough);
  [[nodiscard]] const GatherQueue& out() const noexcept { return out_; }
  /// `count` bytes of the outgoing queue are in the socket.
  void sent(std::size_t count);
  /// Whether all of these pieces, which are at the outgoing queue's front, certainly exist. False: that isn't known.
  [[nodiscard]] bool sends_what_is_there(std::span<const iovec> pieces);
  /// Whether the CPU may read these pieces.
  [[nodiscard]] bool can_read(std::span<const iovec> pieces) const noexcept { return reader_.can_read(pieces); }
  /// The bytes at the front of the outgoing queue can't be read: their frame goes on without them, and their operation
  /// alone fails. @return false if they are nobody's buffers.
  [[nodiscard]] bool source_failed();

  [[nodiscard]] FrameReader& reader() noexcept { return reader_; }
  [[nodiscard]] const FrameReader& reader() const noexcept { return reader_; }
  /// `count` bytes have come in where the reader wanted them. @return `errc::protocol_violation`, with `violation()`
  /// saying how.
  [[nodiscard]] std::error_code received(std::size_t count);
  [[nodiscard]] const std::string& violation() const noexcept { return violation_; }

  /// Counts ends of operations' parts and received notifications: events that may have made handlers ready.
  [[nodiscard]] std::uint64_t completed() const noexcept { return completed_; }
  /// See `kit::Link::take_used`. From any thread.
  [[nodiscard]] bool take_used() noexcept {
    return works_.load(std::memory_order_relaxed) || used_.exchange(false, std::memory_order_relaxed);
  }
  /// When bytes came in the last time.
  [[nodiscard]] kit::Clock::time_point last_received() const noexcept { return last_received_; }
  /// Operations under way.
  [[nodiscard]] bool idle() const noexcept { return transfers_.empty(); }

 private:
  struct Transfer {
    std::uint64_t id = 0;
    std::uint64_t order = 0;  ///< Among the sends of a tag.
    std::shared_ptr<StripedOperation> batch;
    ObjectRange range;
    ChunkCursor cursor;
    kit::Fifo<Chunk> outstanding;   ///< Sent and not acknowledged, or asked for and not answered.
    std::size_t pins = 0;           ///< Chunks in the outgoing queue that point into the buffers.
    std::error_code failure;
    std::string why;
    bool checked = false;      ///< Its payload has checksums.
    std::optional<PeerMemory::Way> way;  ///< read: this side makes it alone.
    bool stopping = false;     ///< Ends when the peer has dealt with what was sent of it.
    bool cut = false;          ///< Some of its chunks were taken back.
    bool meets_again = false;  ///< send: the recv that it met is gone; it waits for another when its bytes are out.
    bool notifying = false;    ///< All objects have landed; what is left is the notification.
    bool notification_attached = false;
    bool notification_sent = false;  ///< In a frame of its own, which can't be taken back.
    std::uint64_t failed_object = ~std::uint64_t{0};
    std::uint64_t remote_recv = 0;  ///< send: the recv that it met; 0 before.
    std::size_t next_object = 0;    ///< recv
    std::size_t next_offset = 0;    ///< recv
    kit::Clock::time_point started;
    std::uint64_t sent_before = 0;  ///< Bytes that the connection had sent when this was started.

    /// Whether the peer may have to do with something of it that it hasn't answered.
    [[nodiscard]] bool under_way() const noexcept {
      return notification_sent || (request().kind != TransferKind::read && !outstanding.empty());
    }
    /// Whether all of it has been answered.
    [[nodiscard]] bool whole() const noexcept { return cursor.done() && !cut && !meets_again && outstanding.empty(); }
    [[nodiscard]] kit::Operation& operation() const noexcept { return *batch->operation(); }
    [[nodiscard]] const TransferRequest& request() const noexcept { return operation().request(); }
  };

  struct Drain {
    std::uint64_t id = 0;
    kit::Clock::time_point since;
  };

  struct ControlFrame {
    FrameHeader header;
    std::vector<Descriptor> descriptors;
  };

  /// The answer to a peer's read; or region_removed, which goes out behind the answers that point into the region.
  struct Response {
    FrameHeader header;
    std::vector<iovec> pieces;
    std::vector<Checksum> checksums;  ///< Their lengths.
  };

  /// A recv of the peer's that no send has met.
  struct Post {
    using value_type = std::uint64_t;
    std::vector<value_type> sizes;  ///< Of its buffers.
    bool checked = false;           ///< It wants checksums.

    [[nodiscard]] std::size_t size() const noexcept { return sizes.size(); }
  };

  // Sending (lane_protocol_send-inl.hpp)
  bool fill_control();
  bool fill_response();
  bool fill_data();
  bool fill_read_request();
  [[nodiscard]] bool lies_in_mappable_memory(const TransferRequest& request);
  void add_chunk(Transfer& transfer, FrameHeader header);
  /// @param visit calls what it is given with the payload's pieces of memory, in order.
  /// @return whether `references_` stand for the payload now.
  template <class Visit>
  [[nodiscard]] bool refer(std::uint64_t bytes, Visit visit);
  /// Fills `scratch_` with what a frame says of a part of a write, read or send.
  void describe(const Transfer& transfer, const Chunk& chunk, FrameHeader& header);
  void add_notification(Transfer& transfer);
  void add_checksums(std::span<const iovec> memory, std::span<Checksum> checksums);

  // Beginning and matching (lane_protocol-inl.hpp), ending (lane_protocol_end-inl.hpp)
  void match(std::uint64_t tag);
  void meet(Transfer& send, std::uint64_t recv, const Post& post);
  void tell(FrameHeader header) { control_.push_back({header, {}}); }
  void lose_recv(Transfer& send);
  void wait_for_recv(Transfer& send);
  void tell_recv_aborted(std::uint64_t recv, std::error_code cause, std::size_t count = 0);
  void end(Transfer& transfer, std::error_code cause, std::string why);
  void take_back(Transfer& transfer);
  void ask_fence();
  /// @param which objects of the chunk `status` is of; null: all.
  void settle(Transfer& transfer, const Chunk& chunk, std::error_code status, const ObjectSet* which = nullptr);
  void forget(const Transfer& transfer);

  // Receiving (lane_protocol_receive-inl.hpp), checksums (lane_protocol_checksums-inl.hpp)
  [[nodiscard]] std::error_code check_header(const FrameHeader& header) override;
  [[nodiscard]] bool take_memory(std::size_t bytes) override { return frame_memory_.take(bytes); }
  [[nodiscard]] std::error_code begin_payload(Frame& frame, std::vector<iovec>& scatter) override;
  [[nodiscard]] std::error_code fetch(Frame& frame, std::span<const iovec> destinations) override;
  [[nodiscard]] bool surely_there(std::span<const iovec> pieces) override {
    return memory_ && memory_->surely_there(pieces);
  }
  [[nodiscard]] std::error_code end_frame(Frame& frame) override;
  [[nodiscard]] std::error_code region_pieces(const FrameHeader& header, std::span<const Descriptor> descriptors,
                                              const kit::RegionList& all, Access needed, std::vector<iovec>& pieces,
                                              std::error_code& status);
  static void local_pieces(const Transfer& transfer, const Chunk& chunk, std::vector<iovec>& pieces);
  [[nodiscard]] std::error_code begin_read_data(const Frame& frame, std::vector<iovec>& scatter);
  [[nodiscard]] std::error_code begin_send_data(const Frame& frame, std::vector<iovec>& scatter);
  [[nodiscard]] std::error_code end_write(Frame& frame);
  [[nodiscard]] std::error_code end_acknowledgement(const Frame& frame);
  [[nodiscard]] std::error_code end_read(const Frame& frame);
  [[nodiscard]] std::error_code end_read_data(const Frame& frame);
  [[nodiscard]] std::error_code end_recv_post(Frame& frame);
  [[nodiscard]] std::error_code end_recv_cancel(const FrameHeader& header);
  [[nodiscard]] std::error_code end_send_data(const Frame& frame);
  [[nodiscard]] std::error_code end_send_abort(const FrameHeader& header);
  [[nodiscard]] std::error_code end_probe(const FrameHeader& header);
  [[nodiscard]] std::error_code end_probe_answer(const FrameHeader& header);
  [[nodiscard]] std::error_code end_fence();
  [[nodiscard]] std::error_code end_fence_ack();

  // Regions that are mapped by the other side (lane_protocol_shared-inl.hpp)
  void share_regions(const kit::RegionList& now);
  /// @return nothing if the peer has to be asked.
  [[nodiscard]] std::optional<PeerMemory::Way> way_to_read(const TransferRequest& request) const;
  [[nodiscard]] std::error_code end_region_shared(const Frame& frame);
  [[nodiscard]] std::error_code end_region_mapped(const FrameHeader& header);

  // Regions that come and go (lane_protocol_regions-inl.hpp)
  /// As they are now.
  [[nodiscard]] const kit::RegionList& regions();
  void tell_removed_first(std::uint32_t number);
  [[nodiscard]] std::error_code end_region_added(const FrameHeader& header);
  [[nodiscard]] std::error_code end_region_removed(const FrameHeader& header);
  [[nodiscard]] std::error_code end_region_removed_ack(const FrameHeader& header);
  [[nodiscard]] std::error_code acknowledge(FrameHeader header, std::vector<Descriptor> which = {});
  [[nodiscard]] std::error_code check_checksums(const Frame& frame);
  /// The error in the payload of a received frame.
  [[nodiscard]] static std::error_code fault_of(const Frame& frame);
  /// The result of a frame's payload: `fault_of`, or of the comparison with its checksums. Fills in `differing_`.
  [[nodiscard]] std::error_code landed(const Frame& frame);
  /// For an acknowledgement; empty if nothing differs.
  [[nodiscard]] std::vector<Descriptor> differing_objects(const Frame& frame) const;
  [[nodiscard]] ObjectSet differing_objects(const Frame& frame, const Transfer& read, const Chunk& chunk) const;
  [[nodiscard]] std::error_code violated(std::string how);
  void use() noexcept {
    if (!used_.load(std::memory_order_relaxed)) {
      used_.store(true, std::memory_order_relaxed);
    }
  }
  /// @return null if the operation has ended; then `ec` tells whether it ever was one of the kind.
  [[nodiscard]] Transfer* find(std::uint64_t id, TransferKind kind, std::error_code& ec);
  /// The write, or the read that is at its notification, whose frame a write_ack answers.
  [[nodiscard]] Transfer* find_acknowledged(std::uint64_t id, std::error_code& ec);

  const std::shared_ptr<kit::LinkHost> host_;
  FrameReader reader_;
  const std::shared_ptr<PeerMemory> memory_;
  GatherQueue out_;
  std::error_code failed_;
  std::string failed_why_;
  bool failed_in_flight_ = false;
  bool peer_gone_ = false;
  bool leaving_ = false;
  std::string violation_;
  kit::Clock::time_point last_received_{};
  std::uint64_t sent_ = 0;

  std::uint64_t next_id_ = 1;
  using Transfers = std::unordered_map<std::uint64_t, Transfer>;
  using Ids = std::unordered_map<const kit::Operation*, std::uint64_t>;
  Transfers transfers_;
  Ids ids_;
  kit::SpareNodes<Transfers> spare_transfers_;
  kit::SpareNodes<Ids> spare_ids_;
  kit::Fifo<Chunk> spare_outstanding_;  ///< Empty, with memory for the next transfer's.
  kit::Fifo<Drain> drains_;  ///< In the order in which they were stopped; those that have ended may still be here.
  std::uint64_t completed_ = 0;
  std::atomic<bool> used_{false};
  std::atomic<bool> works_{false};  ///< There are `transfers_`.

  // This side's fences: one question at a time, those that are asked meanwhile share the next one.
  std::vector<std::function<void()>> fences_;       ///< The question has been sent.
  std::vector<std::function<void()>> next_fences_;
  // The peer's.
  bool fence_owed_ = false;
  bool fence_asked_ = false;

  std::shared_ptr<const kit::RegionList> regions_;  ///< As they were when they were needed last.
  std::shared_ptr<const kit::RegionList>
      told_regions_;  ///< With the handshake; null from when the peer has been told of what has changed since.
  std::uint32_t told_next_region_ = 0;  ///< The peer knows of all below that it needs to know of.
  struct Removed {
    std::uint32_t number = 0;
    std::function<void()> done;
  };
  std::deque<Removed> removed_;             ///< The peer has not confirmed it; oldest first.
  std::size_t queued_removals_ = 0;         ///< Among the responses.
  std::size_t sent_removals_ = 0;           ///< Not confirmed.
  std::size_t queued_removal_answers_ = 0;  ///< To the peer's removals.
  std::uint32_t next_shared_ = 0;           ///< Of all regions below it is settled whether they are handed out.
  std::size_t queued_map_answers_ = 0;      ///< To regions that the peer has handed out.

  kit::Fifo<ControlFrame> control_;
  std::size_t queued_acknowledgements_ = 0;
  std::size_t queued_probe_answers_ = 0;
  std::deque<std::function<void()>> probes_;  ///< Not answered yet, oldest first.
  std::uint64_t last_probe_ = 0;
  kit::Fifo<Response> responses_;
  std::vector<iovec> spare_pieces_;  ///< Empty, with memory for the next response's.
  std::size_t unsent_answers_ = 0;  ///< To reads, in `out_`: they are unanswered until they are sent.
  kit::Fifo<std::uint64_t> ready_data_;    ///< Writes and matched sends with chunks to send, in turn.
  kit::Fifo<std::uint64_t> ready_reads_;   ///< Reads with chunks to ask for, in turn.
  kit::Fifo<std::uint64_t> ready_copies_;  ///< Reads with chunks to copy, in turn.
  bool response_next_ = false;
  std::size_t unacknowledged_ = 0;
  std::size_t outstanding_reads_ = 0;
  std::vector<Descriptor> scratch_;
  std::vector<iovec> checked_memory_;
  std::vector<Checksum> checksums_;
  std::vector<Reference> references_;
  std::size_t referred_ = 0;  ///< Payload of frames that `fill` has added, which references stand for.
  std::vector<iovec> copy_from_;
  std::vector<iovec> copy_to_;

  kit::TagMatcher<Post> matcher_{host_};
  kit::HeldMemory frame_memory_{host_};  ///< Of the frame that is coming in.
  std::uint64_t last_posted_ = 0;
  std::size_t queued_refusals_ = 0;  ///< Of posts beyond the limit.
  std::unordered_map<std::uint64_t, std::uint64_t> sends_by_recv_;

  std::uint64_t receiving_ = 0;   ///< The transfer into whose buffers the payload under way goes.
  std::error_code frame_status_;  ///< What is wrong with the write or read under way.
  std::vector<iovec> landing_;    ///< Where the payload under way goes, if it has checksums.
  std::vector<std::size_t> differing_;  ///< Its checksums that differ from what has landed.
};

}  // namespace kvferry::tcp
