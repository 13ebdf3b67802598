// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
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

#include <kvferry/kit/striped_operation.hpp>
#include <kvferry/kit/tag_matcher.hpp>
#include "borrowed_memory.hpp"
#include "checksums.hpp"
#include "endpoint.hpp"
#include "link_regions.hpp"
#include "message.hpp"
#include "parts_clock.hpp"
#include "rail_terms.hpp"
#include "work_list.hpp"
#include "work_planner.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {

/// The protocol of a rail, without its queue pair: lists of work requests go out through `fill`, completions and
/// messages come in. One thread at a time.
///
/// One-sided operations become RDMA writes and reads of the peer's regions. A recv is posted to the sender, with the
/// keys of the buffers that the sender may write to. The sender matches it with its sends by tag, writes large objects
/// straight into these buffers, and sends the rest in messages behind. There are never more messages than receive
/// buffers that the peer has posted.
class RailProtocol {
 public:
  /// @param place the rail's place among `regions->rails()`.
  /// @param slots the first ones.
  /// @param look never null.
  RailProtocol(std::shared_ptr<kit::LinkHost> host, std::shared_ptr<LinkRegions> regions, std::size_t place,
               MessageSlots slots, RailTerms terms, std::shared_ptr<const MemoryLook> look);
  RailProtocol(const RailProtocol&) = delete;
  RailProtocol& operator=(const RailProtocol&) = delete;

  /// The parts that an operation needs besides itself, made on its caller's thread.
  struct Preparation {
    std::shared_ptr<const SliceTable> own_memory;  ///< The channel's regions, as they were then.
    std::unique_ptr<BorrowedMemory> borrowed;
    std::unique_ptr<OfferedBuffers> offered;  ///< recv
    std::vector<bool> uncompared = {};        ///< With checksums: see `landing_on_others`.
  };

  /// Takes objects `range` of an operation.
  void start(std::shared_ptr<kit::StripedOperation> batch, kit::ObjectRange range, Preparation preparation);

  /// Ends an operation's part with the operation's stop cause: now, or when nothing of it can land any more, because
  /// the adapters have completed its requests and the peer has answered its messages (see `draining_since`). If all of
  /// it has landed by then, it ends with success. A send of which some messages have been posted asks the peer to
  /// confirm that it accepts no more. A notification of which some messages have been posted is sent whole.
  void stop(const kit::Operation& operation);

  /// Asks the peer, and calls `done` when all writes that it had started by then have ended, or the queue pair is gone. If there
  /// is no memory for it, `done` is as it was, or has been taken and `fail` calls it.
  void fence(std::function<void()>&& done);
  /// The number of the peer's fences that have come and not been begun.
  [[nodiscard]] std::size_t fences_asked() const noexcept;
  /// Begins the first `count` of them: they wait for all writes that are known here. Call it with their number from
  /// before this side listed its writes: a later fence may be newer than a write that is not in the list yet.
  void begin_fences(std::size_t count);

  /// @name Regions that come and go: what `kit::Link` has of the same names, for one rail
  /// @{
  void region_added();
  /// As to `done` see `fence`.
  void region_removed(std::uint32_t number, std::function<void()>&& done);
  void ask_regions(std::function<void()> done);
  /// @}

  /// The time since which the operation that was stopped first has waited for the adapters; nothing if there is none.
  [[nodiscard]] std::optional<kit::Clock::time_point> draining_since() const;
  /// The time since which the peer has not sent 64 KiB more of a recv's list of buffers, or of a notification; nothing
  /// if it sends neither.
  [[nodiscard]] std::optional<kit::Clock::time_point> unfinished_since() const;
  /// Ends operations that have waited since `until` or longer, if possible. @return whether some remain, for which the
  /// queue pair has to be destroyed.
  [[nodiscard]] bool cut_off(kit::Clock::time_point until);

  /// The queue pair is gone: ends all parts, later ones too.
  /// @param culprit the operation that broke the connection, which gets `cause`; 0 for none. The others get
  ///   `cause_for_others`.
  void fail(std::error_code cause, const std::string& why, std::uint64_t culprit = 0);
  /// @return `cause` if there is no culprit, or if it means that the peer can't be reached. Else
  ///   `errc::connection_lost`: one operation's fault doesn't concern the others, which may be tried again.
  [[nodiscard]] static std::error_code cause_for_others(std::error_code cause, std::uint64_t culprit) noexcept;

  /// Makes the next list of work requests; its requests' `wr_id`s are what `fail` takes for a culprit.
  /// @return false if there is nothing to do. Otherwise post the list, or call `fail`.
  [[nodiscard]] bool fill(WorkList& list);
  /// Whether there is something for `check_step` to do.
  [[nodiscard]] bool checks_wait() const noexcept {
    return !checking_.empty() || (!asked_.empty() && control_.size() < max_queued_answers);
  }
  /// Takes and compares checksums, of about a part of an object for either side. @return whether there was anything to do.
  [[nodiscard]] bool check_step();
  /// Makes a list of one request that the peer's adapter answers by itself. @return false if the queue is full.
  /// `answered` is called by `completed` when the peer's adapter has answered it.
  [[nodiscard]] bool fill_probe(WorkList& list, std::function<void()> answered = {});
  /// Makes a list of one message of this type, if it may be sent now.
  [[nodiscard]] bool fill_message(WorkList& list, MessageType type, std::uint64_t operation, std::uint64_t tag);
  /// From now on nothing new is accepted from the peer: it is neither handed on nor answered. Outstanding answers go
  /// out through `fill_answers`.
  void leave() noexcept {
    leaving_ = true;
    asked_.clear();
  }
  /// Makes a list of answers, or of one message that tells of receive buffers. @return false if nothing is left, or nothing can
  /// go now.
  [[nodiscard]] bool fill_answers(WorkList& list);
  /// Whether the peer has all answers, and nothing else is under way to it.
  [[nodiscard]] bool settled() const noexcept { return control_.empty() && posted_ == 0 && draining_ == 0; }
  /// Reports that the oldest list has completed.
  void completed();
  /// Whether operations have more to move than has been posted.
  [[nodiscard]] bool work_waits() const noexcept { return !moving_.empty(); }
  /// The share of the limit that is with the adapter: of the bytes or of the queue's places, whichever is more.
  [[nodiscard]] double window_used() const noexcept;

  /// @name Memory for messages, of which there is little at first
  /// @{
  /// Whether messages wait for a place to be sent from, and there may be more.
  [[nodiscard]] bool wants_slots() const noexcept { return wants_slots_; }
  [[nodiscard]] std::size_t slot_count() const noexcept { return slots_.size(); }
  /// Of the same size as the first ones.
  void add_slots(const MessageSlots& more);
  /// Whether the peer sends as much as there are receive buffers for, and there may be more.
  [[nodiscard]] bool wants_buffers() const noexcept { return wants_buffers_; }
  [[nodiscard]] std::size_t buffer_count() const noexcept { return own_buffers_; }
  /// So many more have been posted: the next message tells the peer.
  void add_buffers(std::size_t more) noexcept;
  /// There is no memory for more: messages wait for what there is, from now on.
  void stay_small() noexcept;
  /// @}

  /// The first message of a connection has come in. @return whether it is of this type, incarnation and rail.
  [[nodiscard]] bool greeted(std::span<const std::byte> message, MessageType type, std::uint64_t incarnation,
                             std::uint64_t rail);
  /// A message has come in, out of a receive buffer that has been posted again. @return `errc::protocol_violation`,
  /// with `violation()` saying how; `errc::peer_closed` if it was a goodbye.
  [[nodiscard]] std::error_code received(std::span<const std::byte> message);
  [[nodiscard]] const std::string& violation() const noexcept { return violation_; }

  /// The largest object of a send that always goes in messages.
  [[nodiscard]] std::size_t eager_bytes() const noexcept { return terms_.eager_bytes; }

  /// Operations under way.
  [[nodiscard]] bool idle() const noexcept { return transfers_.empty(); }
  /// Work requests with the adapter.
  [[nodiscard]] std::size_t posted() const noexcept { return posted_; }
  [[nodiscard]] std::size_t posted_bytes() const noexcept { return posted_bytes_; }
  /// Messages that the peer has room for.
  [[nodiscard]] std::size_t credits() const noexcept { return credits_; }
  /// The peer's messages for which it has got no credit back.
  [[nodiscard]] std::size_t owed() const noexcept { return owed_; }

 private:
  enum class State : std::uint8_t {
    moving,     ///< write, read, send: work requests are to be posted.
    matching,   ///< send: waits for a recv.
    telling,    ///< send: messages are to be sent.
    told,       ///< Everything of it is posted or said.
    notifying,  ///< write, read: all has landed on all rails; what is left is the notification.
    stopping,   ///< Waits for what is under way.
  };

  /// Where a batch's checksums have got to.
  struct Cursor {
    std::size_t object = 0;
    std::uint64_t offset = 0;
  };

  /// The checksums of a transfer: of a write or read as a whole, of a send or recv as far as the two sides met.
  struct Checks {
    bool on = false;
    Cursor next;               ///< The part whose sum is taken next. recv: the part that the peer tells of next.
    std::size_t decided = 0;   ///< Objects before it have landed or failed. Not of a recv or send.
    std::size_t unanswered = 0;  ///< Messages with checksums. recv: of the peer's.
    bool queued = false;         ///< In `checking_`.
    bool ready = false;          ///< In `questions_ready_`.
    std::uint64_t bytes = 0;     ///< Of the following's parts.
    std::vector<std::byte> question;
    std::size_t parts = 0;
    Cursor begin;                  ///< Of the question's first part.
    std::vector<bool> uncompared;  ///< Empty: none.
    std::vector<bool> differing;   ///< Empty: none.
    std::error_code failure;          ///< Why they couldn't be compared.
    std::vector<std::uint64_t> came;  ///< recv: the bytes of each object.
    bool complete = false;            ///< recv: all of it has come.
  };

  struct Transfer {
    std::uint64_t id = 0;
    std::shared_ptr<kit::StripedOperation> batch;
    kit::ObjectRange range;
    State state = State::moving;
    std::shared_ptr<const PeerRegionList> remote;  ///< write, read: the planner's.
    std::shared_ptr<const SliceTable> own_memory;
    WorkPlanner planner;
    std::unique_ptr<BorrowedMemory> borrowed;
    std::unique_ptr<OfferedBuffers> offered;
    std::size_t outstanding = 0;  ///< Records of it that are with the adapter.
    std::size_t landed_end = 0;   ///< write, read: objects before it have landed.
    std::error_code failure;
    std::string why;
    bool notification_attached = false;
    bool notification_done = false;
    bool parts_done = false;      ///< write, read: all rails have reported that it has landed.
    bool arrival_awaited = false;  ///< write: the peer has been asked for an answer behind its bytes.
    bool answer_awaited = false;  ///< Stopped, but the peer has been told of it, and will say what it did.
    bool recv_posted = false;     ///< recv: the peer has been told of all or some of it.
    bool acknowledged = false;
    std::uint64_t sent_as = 0;      ///< send: the id of this attempt, as the peer knows it.
    std::uint64_t remote_recv = 0;  ///< send: the recv that it met; 0 before.
    std::vector<PostedBuffer> post;
    Checks checks;
    std::vector<bool> refused;
    std::size_t next_object = 0;  ///< send, recv: in messages.
    std::size_t next_offset = 0;
    std::size_t said = 0;  ///< recv: objects posted. notification: bytes sent.
    kit::Clock::time_point stopped;

    [[nodiscard]] kit::Operation& operation() const noexcept { return *batch->operation(); }
    [[nodiscard]] const TransferRequest& request() const noexcept { return operation().request(); }
    [[nodiscard]] std::span<const MutableBuffer> objects() const noexcept {
      return borrowed ? borrowed->objects() : std::span<const MutableBuffer>(request().objects);
    }
  };

  /// The posted work, oldest first: requests of one transfer, or a message.
  struct Record {
    std::uint64_t transfer = 0;  ///< 0: none.
    std::size_t requests = 0;
    std::size_t bytes = 0;
    std::size_t objects_end = 0;
    std::size_t slot = 0;
    bool has_slot = false;
    bool ends_list = false;
    bool probe = false;  ///< Somebody waits for its answer.
  };

  /// A recv of the peer's, and its buffers.
  struct Post {
    using value_type = PostedBuffer;
    [[nodiscard]] std::size_t size() const noexcept { return buffers.size(); }

    std::vector<PostedBuffer> buffers;
    bool checked = false;  ///< The recv is to have checksums.
  };

  /// A recv of the peer's whose buffers come in several messages.
  struct Assembly {
    std::uint64_t recv = 0;  ///< 0: none.
    std::uint64_t tag = 0;
    Post post;
    std::size_t count = 0;  ///< Of the buffers that have come.
    bool refused = false;   ///< There is no room for it.
  };

  // Posting (rail_protocol_post.cpp)
  bool add_message(WorkList& list);
  bool add_recv_post(WorkList& list);
  bool add_notification(WorkList& list);
  bool add_send_data(WorkList& list);
  bool add_work(WorkList& list, std::size_t most_requests);
  [[nodiscard]] bool messages_wait() const noexcept;
  void took_message() noexcept;
  [[nodiscard]] std::byte* begin_message();
  void end_message(WorkList& list, MessageHeader header);
  void add_record(WorkList& list, Record record);
  void tell(const MessageHeader& header) { control_.push_back(header); }
  void answer_fences();
  void tell_recv_aborted(std::uint64_t recv, std::error_code cause, std::size_t count = 0, std::uint64_t answer_to = 0);
  void match(std::uint64_t tag);
  void meet(Transfer& send, std::uint64_t recv, Post post);
  void lose_recv(Transfer& send);
  void planned_all(Transfer& transfer);
  void await_arrival(Transfer& write);
  void abort_send(Transfer& send);
  void refuse_complete(const Transfer& recv);
  void end_if_done(Transfer& transfer);
  void end_when_drained(Transfer& transfer, std::error_code cause, std::string why = {});
  void end(Transfer& transfer, std::error_code cause, std::string why);
  [[nodiscard]] static bool told_all(const Transfer& transfer) noexcept;
  [[nodiscard]] static bool told_some(const Transfer& send) noexcept;
  [[nodiscard]] static bool notification_begun(const Transfer& transfer) noexcept;
  [[nodiscard]] static bool has_landed(const Transfer& transfer) noexcept;
  [[nodiscard]] static bool may_land(const Transfer& transfer) noexcept;
  void forget_meeting(Transfer& transfer);
  void forget(Transfer& transfer);
  [[nodiscard]] bool is_direct(const Transfer& send, std::size_t object) const;

  // Receiving (rail_protocol_receive.cpp)
  [[nodiscard]] std::error_code check(const MessageHeader& header, std::size_t bytes);
  [[nodiscard]] std::error_code end_notify(const MessageHeader& header, std::span<const std::byte> body);
  [[nodiscard]] std::error_code end_notify_ack(const MessageHeader& header);
  [[nodiscard]] std::error_code end_recv_post(const MessageHeader& header, std::span<const std::byte> body);
  void forget_assembly();
  [[nodiscard]] std::error_code end_recv_cancel(const MessageHeader& header);
  [[nodiscard]] std::error_code end_recv_cancel_ack(const MessageHeader& header);
  [[nodiscard]] std::error_code end_send_data(const MessageHeader& header, std::span<const std::byte> body);
  [[nodiscard]] std::error_code take_sent_object(Transfer& recv, std::span<const std::byte>& body);
  [[nodiscard]] std::error_code end_send_ack(const MessageHeader& header);
  [[nodiscard]] std::error_code end_send_abort(const MessageHeader& header);
  [[nodiscard]] std::error_code end_fence(const MessageHeader& header);
  [[nodiscard]] std::error_code end_fence_ack(const MessageHeader& header);

  // Regions that come and go (rail_protocol_regions.cpp)
  [[nodiscard]] kit::Failure look_up_regions(const TransferRequest& request, kit::ObjectRange range);
  void tell_added(const LocalRegion& region);
  void tell_removed(std::uint32_t number, std::function<void()>&& done);
  bool add_news(WorkList& list);
  void answer_removals();
  void fail_regions();
  [[nodiscard]] std::error_code end_region_added(const MessageHeader& header, std::span<const std::byte> body);
  [[nodiscard]] std::error_code end_region_removed(const MessageHeader& header);
  [[nodiscard]] std::error_code end_region_removed_ack(const MessageHeader& header);
  [[nodiscard]] std::error_code end_regions_question(const MessageHeader& header);
  [[nodiscard]] std::error_code end_regions_answer(const MessageHeader& header);

  // Checksums: taken and told (rail_protocol_checks.cpp)
  [[nodiscard]] kit::Failure begin_checks(Transfer& transfer, std::vector<bool> uncompared);
  void begin_checks(Transfer& send, bool asked_for);
  void go_on_checking(Transfer& transfer);
  [[nodiscard]] static bool needs_sum(const Transfer& transfer, std::size_t object);
  [[nodiscard]] static std::uint64_t bytes_of(const Transfer& transfer, std::size_t object);
  static void skip_what_needs_none(Transfer& transfer, Cursor& cursor, std::size_t end);
  [[nodiscard]] static std::size_t checkable(const Transfer& transfer);
  [[nodiscard]] static bool all_asked(const Transfer& transfer) noexcept;
  [[nodiscard]] static bool all_checked(const Transfer& transfer) noexcept;
  [[nodiscard]] std::size_t parts_in_message(const Transfer& transfer) const noexcept;
  [[nodiscard]] std::uint64_t add_sum(Transfer& transfer);
  bool ask_step();
  bool add_question(WorkList& list);
  void decide(Transfer& transfer, std::size_t end);
  static void decide_send(Transfer& send);
  [[nodiscard]] std::error_code end_check_answer(const MessageHeader& header);

  // The peer's: compared and answered (rail_protocol_compare.cpp)
  bool answer_step();
  static void note_differing(Transfer& transfer, std::size_t object);
  void end_checked_recv(Transfer& recv);
  [[nodiscard]] std::error_code end_check_memory(const MessageHeader& header, std::span<const std::byte> body);
  [[nodiscard]] std::error_code end_check_recv(const MessageHeader& header, std::span<const std::byte> body);

  [[nodiscard]] std::error_code answer(const MessageHeader& header);
  [[nodiscard]] std::error_code room_for_answer();
  [[nodiscard]] std::error_code violated(std::string how);
  [[nodiscard]] Transfer* find(std::uint64_t id, TransferKind kind, std::error_code& ec);
  /// The write, or the read that is at its notification, that a notify_ack answers.
  [[nodiscard]] Transfer* find_notifier(std::uint64_t id, std::error_code& ec);

  const std::shared_ptr<kit::LinkHost> host_;
  const std::shared_ptr<LinkRegions> regions_;
  const std::size_t place_;
  struct Slot {
    std::byte* memory = nullptr;
    std::uint32_t key = 0;
  };
  std::vector<Slot> slots_;
  const std::size_t slot_bytes_;
  const RailTerms terms_;
  const std::shared_ptr<const MemoryLook> look_;
  std::error_code failed_;
  std::string failed_why_;
  std::string violation_;
  bool leaving_ = false;

  std::uint64_t next_id_ = 1;
  std::unordered_map<std::uint64_t, Transfer> transfers_;
  std::unordered_map<const kit::Operation*, std::uint64_t> ids_;
  std::size_t draining_ = 0;

  // Requests with the adapter
  std::deque<Record> records_;
  std::deque<std::function<void()>> probes_;  ///< Of the records that are some, oldest first.
  std::size_t posted_ = 0;
  std::size_t posted_bytes_ = 0;
  std::uint64_t recorded_ = 0;   ///< Records in all.
  std::uint64_t completed_ = 0;  ///< Those of them that have been completed.
  std::vector<std::size_t> free_slots_;
  std::size_t credits_ = 0;  ///< Receive buffers of the peer that no message is meant for.
  std::size_t owed_ = 0;     ///< Receive buffers of this side of whose (re)posting the peer has not been told.
  std::size_t own_buffers_ = 0;
  std::size_t taken_ = 0;  ///< The peer's messages since it was told of buffers last.
  bool may_grow_ = true;
  bool wants_slots_ = false;
  bool wants_buffers_ = false;

  // Transfers that wait to be posted; ids of transfers that have ended, or are in another state by now, are skipped.
  std::deque<MessageHeader> control_;
  std::deque<std::uint64_t> recv_posts_;
  std::deque<std::uint64_t> notifications_;
  std::deque<std::uint64_t> telling_;  ///< Sends with messages, in turn.
  std::deque<std::uint64_t> moving_;   ///< Transfers with work requests, in turn.

  kit::TagMatcher<Post> matcher_{host_};
  std::unordered_map<std::uint64_t, std::uint64_t> sends_by_recv_;
  std::unordered_map<std::uint64_t, std::uint64_t> sends_by_attempt_;
  std::uint64_t last_posted_ = 0;
  Assembly assembly_;
  PartsClock assembly_clock_;
  kit::HeldMemory assembly_memory_{host_};
  /// The peer's, which it waits to have answered.
  struct Fence {
    std::uint64_t id = 0;
    std::uint64_t before = 0;  ///< Of the writes with smaller ids; 0: not begun.
    std::size_t writes = 0;
  };
  std::vector<Fence> fences_;
  std::unordered_map<std::uint64_t, std::function<void()>> own_fences_;

  /// A message with which nothing that is told later may catch up.
  struct News {
    MessageHeader header;
    RegionKeys keys;  ///< region_added
    std::uint64_t page_size = 0;
  };
  struct Removed {
    std::uint32_t number = 0;
    std::function<void()> done;
  };
  /// Of a region of the peer's, which it waits to have answered.
  struct Removal {
    std::uint32_t number = 0;
    std::uint64_t behind = 0;  ///< Of so many records.
  };
  std::deque<News> news_;
  std::shared_ptr<const kit::RegionList> told_regions_;  ///< With the handshake; null from when its changes were told.
  std::uint32_t told_next_region_ = 0;                   ///< The peer knows of all below that it needs to know of.
  std::deque<Removed> removed_;                          ///< This side's, until the peer has answered.
  std::size_t told_removals_ = 0;                        ///< The first ones of those.
  std::shared_ptr<const PeerRegionList> remote_;         ///< As they were when they were needed last.
  std::deque<Removal> removals_;
  std::size_t questions_ = 0;  ///< The peer's, of which the answers are among the news.
  std::unordered_map<std::uint64_t, std::function<void()>> own_questions_;
  PeerRegion coming_;  ///< Of the peer's, with the keys of the first rails.
  RemoteRegion coming_region_;

  /// A message with checksums that the peer has not answered.
  struct Question {
    std::uint64_t id = 0;
    std::uint64_t transfer = 0;  ///< May have ended.
    std::uint64_t attempt = 0;   ///< `Transfer::sent_as`
    Cursor begin;
    std::size_t parts = 0;
    std::size_t end = 0;  ///< Objects before it are in this message, or were in others.
  };
  /// One of the peer's.
  struct Asked {
    struct Part {
      std::size_t object = 0;
      std::uint64_t offset = 0;
      std::uint64_t length = 0;
      std::uint64_t sum = 0;
    };
    std::uint64_t id = 0;
    std::uint64_t recv = 0;             ///< 0: of memory in regions.
    bool written = false;               ///< By the peer.
    std::vector<CheckedRange> ranges;   ///< Of regions.
    std::vector<Part> parts;            ///< Of the recv.
    std::size_t next = 0;
    std::array<std::uint64_t, 2> differing{};
  };
  std::deque<std::uint64_t> checking_;         ///< Transfers whose sums are to be taken, in turn.
  std::deque<std::uint64_t> questions_ready_;  ///< Transfers with a message of checksums.
  std::deque<Question> questions_asked_;       ///< In order, as the answers come.
  std::deque<Asked> asked_;
  std::shared_ptr<const kit::RegionList> own_regions_;  ///< As they were when they were needed last.
  std::vector<iovec> pieces_;                           ///< Of a part; kept for its memory.

  std::vector<std::byte> notification_;  ///< The peer's one that is coming in, in parts.
  std::uint64_t notification_of_ = 0;
  PartsClock notification_clock_;
};

}  // namespace kvferry::rdma
