// SPDX-License-Identifier: Apache-2.0
// This program's own definitions of some verbs take the place of the library's, note the call, and make it; a post can be made
// to fail when a part of it is done.
#include "noted_verbs.hpp"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/stat.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <string>

namespace kvferry::inline KVFERRY_ABI::rdma::testing {

VerbsLog& verbs_log() {
  static VerbsLog log;
  return log;
}

BeforeCall& before_registering() {
  static BeforeCall before;
  return before;
}

BeforeCall& before_deregistering() {
  static BeforeCall before;
  return before;
}

std::atomic<int> room_for_queue_pairs{-1};
std::atomic<ino_t> dmabuf_file{0};
std::atomic<int> registered_dmabuf{-1};

bool is_dmabuf_file(int descriptor) {
  struct stat file {};
  return dmabuf_file != 0 && ::fstat(descriptor, &file) == 0 && file.st_ino == dmabuf_file;
}

std::atomic<const void*> registering_fails_at{nullptr};
std::atomic<int> registrations_left{0};

std::atomic<bool> registering_fails{false};
std::atomic<int> registrations_refused{0};

std::atomic<bool> next_long_post_fails{false};
std::atomic<const ibv_qp*> pair_of_failed_post{nullptr};

std::atomic<MessageType> last_parts_withheld{};

AbsentPeer& absent_peer() {
  static AbsentPeer peer;
  return peer;
}

namespace {

std::atomic<decltype(ibv_context_ops::post_send)> real_post_send{nullptr};

/// The library's one function for it may call the other, and so this program's.
thread_local bool registering = false;

bool is_withheld(const ibv_send_wr& request) {
  const auto type = last_parts_withheld.load();
  if (type == MessageType{} || request.opcode != IBV_WR_SEND) {
    return false;
  }
  MessageHeader header;
  std::memcpy(&header, reinterpret_cast<const void*>(request.sg_list[0].addr), sizeof(header));
  return header.type == type && header.first != 0 && (header.flags & MessageHeader::last) != 0;
}

/// Posts the first request of a list and refuses the others, once it has been asked to.
int post_send(ibv_qp* pair, ibv_send_wr* list, ibv_send_wr** bad) {
  for (ibv_send_wr** request = &list; *request != nullptr; request = &(*request)->next) {
    if (is_withheld(**request)) {
      *request = nullptr;  // with what comes behind it
      break;
    }
  }
  if (list == nullptr) {
    return 0;
  }
  if (list->next == nullptr || !next_long_post_fails.exchange(false)) {
    return real_post_send.load()(pair, list, bad);
  }
  pair_of_failed_post = pair;
  ibv_send_wr* const rest = list->next;
  list->next = nullptr;
  const int result = real_post_send.load()(pair, list, bad);
  list->next = rest;
  *bad = rest;
  return result != 0 ? result : ENOMEM;
}

std::string thread_name() {
  std::array<char, 16> name{};
  (void)::pthread_getname_np(::pthread_self(), name.data(), name.size());
  return name.data();
}

template <class Function>
Function* library_function(const char* name) {
  return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

ibv_qp* ibv_create_qp(ibv_pd* domain, ibv_qp_init_attr* attributes) {
  if (room_for_queue_pairs >= 0 && room_for_queue_pairs-- == 0) {
    room_for_queue_pairs = 0;
    errno = ENOMEM;
    return nullptr;
  }
  ibv_qp* const pair = library_function<decltype(ibv_create_qp)>("ibv_create_qp")(domain, attributes);
  if (pair != nullptr && pair->context->ops.post_send != &post_send) {
    real_post_send = pair->context->ops.post_send;
    pair->context->ops.post_send = &post_send;
  }
  return pair;
}

int ibv_destroy_qp(ibv_qp* pair) {
  const VerbsLog::Call call{VerbsLog::Verb::destroy_queue_pair, pair, pair->context};
  const int result = library_function<decltype(ibv_destroy_qp)>("ibv_destroy_qp")(pair);
  verbs_log().add(call);
  return result;
}

int ibv_modify_qp(ibv_qp* pair, ibv_qp_attr* attributes, int mask) {
  if ((mask & IBV_QP_STATE) != 0 && attributes->qp_state == IBV_QPS_RTR && absent_peer().resolve(attributes->ah_attr)) {
    return ETIMEDOUT;
  }
  return library_function<decltype(ibv_modify_qp)>("ibv_modify_qp")(pair, attributes, mask);
}

#undef ibv_reg_mr
ibv_mr* ibv_reg_mr(ibv_pd* domain, void* address, std::size_t size, int access) {
  before_registering().called(address);
  if (registering_fails) {
    ++registrations_refused;
    errno = ENOMEM;
    return nullptr;
  }
  if (address == registering_fails_at && registrations_left-- <= 0) {
    errno = ENOMEM;
    return nullptr;
  }
  registering = true;
  ibv_mr* const region = library_function<decltype(ibv_reg_mr)>("ibv_reg_mr")(domain, address, size, access);
  registering = false;
  verbs_log().add({.verb = VerbsLog::Verb::do_register,
                   .what = address,
                   .context = domain->context,
                   .thread = thread_name(),
                   .access = static_cast<unsigned>(access)});
  return region;
}

ibv_mr* ibv_reg_mr_iova2(ibv_pd* domain, void* address, std::size_t size, std::uint64_t remote, unsigned access) {
  ibv_mr* const region =
      library_function<decltype(ibv_reg_mr_iova2)>("ibv_reg_mr_iova2")(domain, address, size, remote, access);
  if (!registering) {
    verbs_log().add({.verb = VerbsLog::Verb::do_register,
                     .what = address,
                     .context = domain->context,
                     .thread = thread_name(),
                     .access = access});
  }
  return region;
}

ibv_mr* ibv_reg_dmabuf_mr(ibv_pd* domain, std::uint64_t offset, std::size_t size, std::uint64_t address, int descriptor,
                          int access) {
  if (is_dmabuf_file(descriptor)) {
    registered_dmabuf = descriptor;
    return ibv_reg_mr(domain, reinterpret_cast<void*>(address), size, access);
  }
  return library_function<decltype(ibv_reg_dmabuf_mr)>("ibv_reg_dmabuf_mr")(domain, offset, size, address, descriptor,
                                                                            access);
}

int ibv_dereg_mr(ibv_mr* region) {
  before_deregistering().called(region->addr);
  verbs_log().add({VerbsLog::Verb::deregister, region->addr, region->context, thread_name()});
  return library_function<decltype(ibv_dereg_mr)>("ibv_dereg_mr")(region);
}
}

}  // namespace kvferry::rdma::testing
