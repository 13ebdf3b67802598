// SPDX-License-Identifier: Apache-2.0
// The functions of libibverbs that kvferry::rdma calls, each of which looks itself up in the library when it is first
// called: a host without RDMA has no such library, and loads the module all the same.
#include "verbs_at_run_time.hpp"

#include <kvferry/error.hpp>

#include <dlfcn.h>
#include <infiniband/verbs.h>

#include <cerrno>
#include <string>
#include <type_traits>

namespace kvferry::python {
namespace {

struct Library {
  void* handle = ::dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
  std::string problem = handle == nullptr ? ::dlerror() : "";
};

/// Never closed: its providers leave things behind in the process.
const Library& library() {
  static const auto* const loaded = new Library;
  return *loaded;
}

template <class Function>
Function* find(const char* name) {
  return library().handle == nullptr ? nullptr : reinterpret_cast<Function*>(::dlsym(library().handle, name));
}

/// What a function that isn't there returns: a null pointer, an errno, or a text.
template <class Result>
Result missing() {
  errno = ENOSYS;
  if constexpr (std::is_same_v<Result, const char*>) {
    return "libibverbs is not loaded";
  } else if constexpr (std::is_pointer_v<Result>) {
    return nullptr;
  } else if constexpr (std::is_same_v<Result, ssize_t>) {
    return -ENOSYS;
  } else if constexpr (!std::is_void_v<Result>) {
    return static_cast<Result>(ENOSYS);
  }
}

}  // namespace

bool have_verbs() noexcept { return library().handle != nullptr; }

void need_verbs() {
  if (!have_verbs()) {
    throw TransferError(std::make_error_code(std::errc::function_not_supported),
                        "RDMA needs libibverbs (Debian: libibverbs1, ibverbs-providers): " + library().problem);
  }
}

}  // namespace kvferry::python

#undef ibv_query_port
#undef ibv_reg_mr

#define KVFERRY_VERB(Result, name, parameters, arguments)                           \
  extern "C" Result name parameters {                                               \
    static auto* const found = kvferry::python::find<Result parameters>(#name);     \
    return found == nullptr ? kvferry::python::missing<Result>() : found arguments; \
  }

KVFERRY_VERB(void, ibv_ack_async_event, (ibv_async_event * event), (event))
KVFERRY_VERB(void, ibv_ack_cq_events, (ibv_cq * queue, unsigned count), (queue, count))
KVFERRY_VERB(ibv_pd*, ibv_alloc_pd, (ibv_context * context), (context))
KVFERRY_VERB(int, ibv_close_device, (ibv_context * context), (context))
KVFERRY_VERB(ibv_comp_channel*, ibv_create_comp_channel, (ibv_context * context), (context))
KVFERRY_VERB(ibv_cq*, ibv_create_cq,
             (ibv_context * context, int size, void* own, ibv_comp_channel* channel, int vector),
             (context, size, own, channel, vector))
KVFERRY_VERB(ibv_qp*, ibv_create_qp, (ibv_pd * domain, ibv_qp_init_attr* attributes), (domain, attributes))
KVFERRY_VERB(int, ibv_dealloc_pd, (ibv_pd * domain), (domain))
KVFERRY_VERB(int, ibv_dereg_mr, (ibv_mr * region), (region))
KVFERRY_VERB(int, ibv_destroy_comp_channel, (ibv_comp_channel * channel), (channel))
KVFERRY_VERB(int, ibv_destroy_cq, (ibv_cq * queue), (queue))
KVFERRY_VERB(int, ibv_destroy_qp, (ibv_qp * pair), (pair))
KVFERRY_VERB(const char*, ibv_event_type_str, (ibv_event_type type), (type))
KVFERRY_VERB(int, ibv_fork_init, (), ())
KVFERRY_VERB(void, ibv_free_device_list, (ibv_device * *list), (list))
KVFERRY_VERB(int, ibv_get_async_event, (ibv_context * context, ibv_async_event* event), (context, event))
KVFERRY_VERB(int, ibv_get_cq_event, (ibv_comp_channel * channel, ibv_cq** queue, void** own), (channel, queue, own))
KVFERRY_VERB(ibv_device**, ibv_get_device_list, (int* count), (count))
KVFERRY_VERB(const char*, ibv_get_device_name, (ibv_device * device), (device))
KVFERRY_VERB(ibv_fork_status, ibv_is_fork_initialized, (), ())
KVFERRY_VERB(int, ibv_modify_qp, (ibv_qp * pair, ibv_qp_attr* attributes, int mask), (pair, attributes, mask))
KVFERRY_VERB(ibv_context*, ibv_open_device, (ibv_device * device), (device))
KVFERRY_VERB(int, ibv_query_device, (ibv_context * context, ibv_device_attr* attributes), (context, attributes))
KVFERRY_VERB(ssize_t, _ibv_query_gid_table,
             (ibv_context * context, ibv_gid_entry* entries, size_t most, uint32_t flags, size_t size),
             (context, entries, most, flags, size))
KVFERRY_VERB(int, ibv_query_pkey, (ibv_context * context, uint8_t port, int index, __be16* key),
             (context, port, index, key))
KVFERRY_VERB(int, ibv_query_port, (ibv_context * context, uint8_t port, _compat_ibv_port_attr* attributes),
             (context, port, attributes))
KVFERRY_VERB(ibv_mr*, ibv_reg_dmabuf_mr,
             (ibv_pd * domain, uint64_t offset, size_t length, uint64_t address, int descriptor, int access),
             (domain, offset, length, address, descriptor, access))
KVFERRY_VERB(ibv_mr*, ibv_reg_mr, (ibv_pd * domain, void* address, size_t length, int access),
             (domain, address, length, access))
KVFERRY_VERB(ibv_mr*, ibv_reg_mr_iova2, (ibv_pd * domain, void* address, size_t length, uint64_t iova, unsigned access),
             (domain, address, length, iova, access))
KVFERRY_VERB(const char*, ibv_wc_status_str, (ibv_wc_status status), (status))
