// SPDX-License-Identifier: Apache-2.0
#include "queue_pair.hpp"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <random>
#include <utility>

#include <kvferry/error.hpp>

#include "address_vector.hpp"

namespace kvferry::inline KVFERRY_ABI::rdma {
namespace {

/// A probe and a goodbye go when the queue is full of operations' requests, too.
constexpr std::size_t spare_requests = 8;
constexpr std::uint32_t wanted_pieces = 16;
constexpr std::uint32_t wanted_inline = 128;
/// 0.64 ms (InfiniBand's table): what a sender waits that found no receive buffer, which takes a peer that breaks the
/// rules.
constexpr std::uint8_t receiver_not_ready_timer = 12;
constexpr std::uint8_t receiver_not_ready_retries = 7;  // without end
constexpr std::size_t largest_request = std::size_t{1} << 20;

std::uint32_t random_packet_number() {
  std::random_device device;
  return device() & 0xffffff;
}

std::uint64_t mtu_bytes(ibv_mtu mtu) { return std::uint64_t{128} << mtu; }

ibv_mtu mtu_of(std::uint64_t bytes) {
  ibv_mtu mtu = IBV_MTU_256;
  while (mtu != IBV_MTU_4096 && mtu_bytes(mtu) < bytes) {
    mtu = static_cast<ibv_mtu>(mtu + 1);
  }
  return mtu;
}

std::string name_of(ibv_gid_type type) {
  switch (type) {
    case IBV_GID_TYPE_ROCE_V1: return "RoCE v1";
    case IBV_GID_TYPE_ROCE_V2: return "RoCE v2";
    case IBV_GID_TYPE_IB: break;
  }
  return "InfiniBand";
}

}  // namespace

QueuePair::QueuePair(std::shared_ptr<RailDomain> domain, std::size_t rail, const QueuePairOptions& options)
    : domain_(std::move(domain)), options_(options), address_(domain_->device().address()) {
  const ibv_device_attr& limits = domain_->device().limits();
  create();
  change_to_init();
  endpoint_.rail = rail;
  endpoint_.link_layer = address_.ethernet ? "Ethernet" : "InfiniBand";
  endpoint_.gid_type = name_of(address_.gid_type);
  const auto gid = std::as_bytes(std::span(address_.gid.raw));
  endpoint_.gid.assign(gid.begin(), gid.end());
  endpoint_.lid = address_.lid;
  endpoint_.queue_pair = pair_->qp_num;
  endpoint_.packet_number = random_packet_number();
  endpoint_.mtu = mtu_bytes(address_.mtu);
  const auto bounded = [&](int of_device) {
    return std::min(static_cast<std::uint64_t>(std::clamp(of_device, 0, 255)), std::uint64_t{options_.read_depth});
  };
  endpoint_.reads_taken = bounded(limits.max_qp_rd_atom);
  endpoint_.reads_made = bounded(limits.max_qp_init_rd_atom);
  endpoint_.max_message = address_.max_message;
  if (address_.needs_global_route) {
    endpoint_.global_route = 1;
  }
}

void QueuePair::create() {
  const auto fail = [&](const char* what) {
    const auto error = last_verbs_error();
    throw TransferError(error, "RDMA device '" + domain_->device().name() + "': no " + what + ": " + error.message());
  };
  try {
    (void)add_memory(first_messages + first_slots);
  } catch (const std::system_error& error) {
    throw TransferError(error.code(), "RDMA device '" + domain_->device().name() + "': " + error.what());
  }
  CompletionChannelPtr channel(ibv_create_comp_channel(domain_->device().context()));
  if (channel == nullptr) {
    fail("completion channel");
  }
  channel_ = std::shared_ptr<ibv_comp_channel>(channel.release(), [domain = domain_](ibv_comp_channel* made) {
    (void)ibv_destroy_comp_channel(made);  // before the device is closed
  });
  const int flags = ::fcntl(channel_->fd, F_GETFL);
  if (flags < 0 || ::fcntl(channel_->fd, F_SETFL, flags | O_NONBLOCK) != 0) {
    fail("non-blocking completion channel");
  }
  const auto wanted = static_cast<std::uint32_t>(options_.queue_depth + spare_requests);
  const auto sizes = sizes_to_try(domain_->device().limits(), {wanted, wanted_pieces, wanted_inline}, messages);
  completions_.reset(ibv_create_cq(domain_->device().context(), static_cast<int>(sizes.front().requests + messages), nullptr,
                                   channel_.get(), domain_->device().next_completion_vector()));
  if (completions_ == nullptr) {
    fail("completion queue");
  }
  if (std::ranges::none_of(sizes, [this](const QueuePairSize& size) { return create_pair(size); })) {
    fail("queue pair");
  }
}

bool QueuePair::create_pair(const QueuePairSize& size) {
  ibv_qp_init_attr attributes{};
  attributes.send_cq = completions_.get();
  attributes.recv_cq = completions_.get();
  attributes.qp_type = IBV_QPT_RC;
  attributes.cap.max_send_wr = size.requests;
  attributes.cap.max_recv_wr = static_cast<std::uint32_t>(messages);
  attributes.cap.max_send_sge = size.pieces;
  attributes.cap.max_recv_sge = 1;
  attributes.cap.max_inline_data = size.inline_bytes;
  pair_.reset(ibv_create_qp(domain_->handle(), &attributes));
  if (pair_ == nullptr) {
    return false;
  }
  depth_ = size.requests - spare_requests;
  max_inline_ = attributes.cap.max_inline_data;
  max_pieces_ = common_pieces(domain_->device().limits(), std::min(attributes.cap.max_send_sge, wanted_pieces));
  return true;
}

void QueuePair::change_to_init() {
  ibv_qp_attr attributes{};
  attributes.qp_state = IBV_QPS_INIT;
  attributes.pkey_index = domain_->device().partition_index();
  attributes.port_num = domain_->device().port();
  attributes.qp_access_flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
  const int result =
      ibv_modify_qp(pair_.get(), &attributes, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
  if (result != 0) {
    throw TransferError(verbs_error(result),
                        "RDMA device '" + domain_->device().name() + "': the queue pair can't be initialised");
  }
  if (const auto error = post_new_buffers(memory_.front(), first_messages)) {
    throw TransferError(error, "RDMA device '" + domain_->device().name() + "': receive buffers can't be posted");
  }
}

MessageSlots QueuePair::slots() const noexcept {
  return {memory_.front().data() + first_messages * message_bytes, first_slots, slot_bytes_,
          memory_.front().local_key()};
}

const RegisteredBuffer& QueuePair::add_memory(std::size_t places) {
  memory_.reserve(memory_.size() + 1);
  return memory_.emplace_back(domain_->handle(), places * message_bytes);
}

std::error_code QueuePair::post_new_buffers(const RegisteredBuffer& memory, std::size_t count) {
  std::vector<ibv_wc> as_completed(count);
  buffers_.reserve(buffers_.size() + count);
  for (std::size_t i = 0; i < count; ++i) {
    as_completed[i].wr_id = receive_flag | buffers_.size();
    buffers_.push_back({memory.data() + i * message_bytes, memory.local_key()});
  }
  return post_receives(as_completed);
}

MessageSlots QueuePair::double_slots(std::size_t most) {
  const std::size_t count = std::min(slot_count_, most - slot_count_);
  const RegisteredBuffer& memory = add_memory(count);
  slot_count_ += count;
  return {memory.data(), count, slot_bytes_, memory.local_key()};
}

std::size_t QueuePair::double_buffers(std::size_t most, std::error_code& failure) {
  const std::size_t count = std::min(buffers_.size(), most - buffers_.size());
  failure = post_new_buffers(add_memory(count), count);
  return buffers_.size();
}

kit::Failure QueuePair::connect(const Endpoint& peer, const RailEndpoint& peers_rail) {
  if (auto mismatch = check_pairing(endpoint_, peers_rail); !mismatch.empty()) {
    return {errc::handshake_failed, std::move(mismatch)};
  }
  if (!peer.first_messages) {
    // It takes all of them to be there at first.
    std::error_code failure;
    try {
      while (!failure && double_buffers(messages, failure) != messages) {
      }
    } catch (const std::system_error& error) {
      failure = error.code();
    }
    if (failure) {
      return {failure, "RDMA device '" + domain_->device().name() + "': no more receive buffers: " + failure.message()};
    }
  }
  if (auto failure = change_to_ready(peers_rail)) {
    return failure;
  }
  slot_bytes_ = std::min<std::size_t>(message_bytes, static_cast<std::size_t>(peer.message_bytes));
  terms_.peer_buffers = static_cast<std::size_t>(peer.messages);
  terms_.peer_buffers_at_first = static_cast<std::size_t>(peer.first_messages.value_or(peer.messages));
  terms_.own_buffers = messages;
  terms_.own_buffers_at_first = buffers_.size();
  terms_.most_slots = most_slots;
  terms_.checks = static_cast<std::size_t>(std::min<std::uint64_t>(peer.checks.value_or(0), max_checks));
  terms_.queue_depth = depth_;
  terms_.max_inline = max_inline_;
  terms_.request.pieces = max_pieces_;
  terms_.request.bytes =
      static_cast<std::size_t>(std::min(std::uint64_t{largest_request}, agree(endpoint_, peers_rail).max_message));
  terms_.eager_bytes = std::min(options_.eager_bytes, slot_bytes_ - sizeof(MessageHeader) - sizeof(std::uint64_t));
  return {};
}

kit::Failure QueuePair::change_to_ready(const RailEndpoint& peers) {
  const auto failed = [&](int result, const char* state) {
    const auto error = verbs_error(result);
    return kit::Failure{error, "RDMA device '" + domain_->device().name() + "': the queue pair can't be made ready to " + state +
                                   ": " + error.message()};
  };
  const Agreement agreed = agree(endpoint_, peers);
  ibv_qp_attr ready{};
  ready.qp_state = IBV_QPS_RTR;
  ready.path_mtu = mtu_of(agreed.mtu);
  ready.dest_qp_num = static_cast<std::uint32_t>(peers.queue_pair);
  ready.rq_psn = static_cast<std::uint32_t>(peers.packet_number);
  ready.max_dest_rd_atomic = static_cast<std::uint8_t>(agreed.reads_taken);
  ready.min_rnr_timer = receiver_not_ready_timer;
  ready.ah_attr = address_vector(address_, domain_->device().port(), peers, options_.service_level, options_.traffic_class);
  if (const int result = ibv_modify_qp(pair_.get(), &ready,
                                       IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                           IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
      result != 0) {
    return failed(result, "receive");
  }
  ibv_qp_attr sending{};
  sending.qp_state = IBV_QPS_RTS;
  sending.sq_psn = static_cast<std::uint32_t>(endpoint_.packet_number);
  sending.timeout = options_.timeout_exponent;
  sending.retry_cnt = options_.retry_count;
  sending.rnr_retry = receiver_not_ready_retries;
  sending.max_rd_atomic = static_cast<std::uint8_t>(agreed.reads_made);
  if (const int result = ibv_modify_qp(pair_.get(), &sending,
                                       IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                                           IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC);
      result != 0) {
    return failed(result, "send");
  }
  return {};
}

std::error_code QueuePair::post(WorkList& list, std::uint64_t* refused) {
  ibv_send_wr* bad = nullptr;
  const int result = ibv_post_send(pair_.get(), list.finish(), &bad);
  if (result != 0) {
    if (refused != nullptr) {
      *refused = bad == nullptr ? 0 : bad->wr_id;
    }
    return verbs_error(result);
  }
  domain_->device().bytes_written.fetch_add(list.bytes_written, std::memory_order_relaxed);
  domain_->device().bytes_read.fetch_add(list.bytes_read, std::memory_order_relaxed);
  return {};
}

int QueuePair::poll(std::span<ibv_wc> completions) {
  return ibv_poll_cq(completions_.get(), static_cast<int>(completions.size()), completions.data());
}

std::span<const std::byte> QueuePair::message(const ibv_wc& completion) const noexcept {
  const std::size_t buffer = static_cast<std::size_t>(completion.wr_id & ~receive_flag);
  return {buffers_[buffer].memory, std::min<std::size_t>(completion.byte_len, message_bytes)};
}

std::error_code QueuePair::post_receives(std::span<const ibv_wc> completions) {
  std::array<ibv_recv_wr, messages> requests;
  std::array<ibv_sge, messages> pieces;
  std::size_t count = 0;
  for (const ibv_wc& completion : completions) {
    if (!is_receive(completion)) {
      continue;
    }
    const Buffer& buffer = buffers_[static_cast<std::size_t>(completion.wr_id & ~receive_flag)];
    pieces[count] = {address_of(buffer.memory), static_cast<std::uint32_t>(message_bytes), buffer.key};
    requests[count] = {};
    requests[count].wr_id = completion.wr_id;
    requests[count].sg_list = &pieces[count];
    requests[count].num_sge = 1;
    if (count != 0) {
      requests[count - 1].next = &requests[count];
    }
    ++count;
  }
  if (count == 0) {
    return {};
  }
  ibv_recv_wr* bad = nullptr;
  const int result = ibv_post_recv(pair_.get(), requests.data(), &bad);
  return result == 0 ? std::error_code() : verbs_error(result);
}

std::error_code QueuePair::arm() {
  const int result = ibv_req_notify_cq(completions_.get(), 0);
  return result == 0 ? std::error_code() : verbs_error(result);
}

void QueuePair::take_events() {
  ibv_cq* queue = nullptr;
  void* context = nullptr;
  unsigned events = 0;
  while (ibv_get_cq_event(channel_.get(), &queue, &context) == 0) {
    ++events;
  }
  if (events != 0) {
    ibv_ack_cq_events(completions_.get(), events);
  }
}

}  // namespace kvferry::rdma
