// SPDX-License-Identifier: Apache-2.0
#include "memory.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "arguments.hpp"
#include "released.hpp"

namespace kvferry::python {
namespace {

std::string class_name(nb::handle object) { return nb::cast<std::string>(nb::str(object.type().attr("__qualname__"))); }

std::string device_name(int type, int id) {
  switch (type) {
    case nb::device::cuda::value: return "cuda:" + std::to_string(id);
    case nb::device::rocm::value: return "rocm:" + std::to_string(id);
    default: return "DLPack device type " + std::to_string(type) + ", number " + std::to_string(id);
  }
}

/// Only host memory can be named by the address that a tensor has.
void check_device(nb::handle object) {
  const auto [type, id] = converted<std::pair<int, int>>(object.attr("__dlpack_device__")(), "__dlpack_device__()");
  if (type != nb::device::cpu::value && type != nb::device::cuda_host::value) {
    throw wrong_type("the memory of this " + class_name(object) + " is on " + device_name(type, id) +
                     ": only host memory can be moved; a region of a device takes its dma-buf (Region, dmabuf_fd)");
  }
}

template <class Array>
bool is_contiguous(const Array& array) {
  std::int64_t expected = 1;
  for (std::size_t i = array.ndim(); i-- > 0;) {
    if (array.shape(i) == 0) {
      return true;
    }
    if (array.shape(i) != 1 && array.stride(i) != expected) {
      return false;
    }
    expected *= static_cast<std::int64_t>(array.shape(i));
  }
  return true;
}

template <class Array>
bool import_tensor(nb::handle object, MutableBuffer& bytes, std::shared_ptr<void>& keep) {
  Array array;
  if (!nb::try_cast(object, array, false)) {
    return false;
  }
  if (!is_contiguous(array)) {
    throw nb::type_error("a tensor whose bytes don't lie end to end can't be moved as one object: make it contiguous");
  }
  bytes = {static_cast<std::byte*>(const_cast<void*>(static_cast<const void*>(array.data()))), array.nbytes()};
  keep = std::make_shared<Array>(std::move(array));
  return true;
}

Access access_of(std::string_view name) {
  for (const auto& [text, access] : {std::pair{"none", Access::none}, std::pair{"read", Access::read},
                                     std::pair{"write", Access::write}, std::pair{"read_write", Access::read_write}}) {
    if (name == text) {
      return access;
    }
  }
  throw wrong_value("access is 'none', 'read', 'write' or 'read_write', not '" + std::string(name) + "'");
}

/// Memory that peers can't write to may be read only.
std::pair<std::shared_ptr<Memory>, bool> memory_of_region(nb::handle memory, Access access) {
  if (!allows(access, Access::write)) {
    try {
      return {std::make_shared<Memory>(memory, true), true};
    } catch (const nb::python_error&) {
    } catch (const nb::builtin_exception&) {
    }
    return {std::make_shared<Memory>(memory, false), false};
  }
  return {std::make_shared<Memory>(memory, true), true};
}

}  // namespace

Memory::Memory(nb::handle object, bool writable) {
  const IntoPython calling;
  if (nb::hasattr(object, "__dlpack_device__")) {
    check_device(object);
  }
  if (nb::isinstance<nb::tuple>(object)) {
    take_address(object);
  } else if (PyObject_CheckBuffer(object.ptr()) != 0) {
    take_buffer(object, writable);
  } else if (nb::hasattr(object, "__dlpack__")) {
    take_dlpack(object, writable);
  } else {
    throw wrong_type("'" + class_name(object) +
                     "' is no memory: give something with the buffer protocol or DLPack, or (address, size)");
  }
}

Memory::~Memory() {
  if (view_.obj != nullptr) {
    PyBuffer_Release(&view_);
  }
}

void Memory::take_address(nb::handle object) {
  std::pair<std::uint64_t, std::uint64_t> given;
  if (!nb::try_cast(object, given, false)) {
    throw nb::type_error("memory by its address is a tuple of two integers, (address, size)");
  }
  // NOLINTNEXTLINE(performance-no-int-to-ptr): this is what the caller asks for
  bytes_ = {reinterpret_cast<std::byte*>(given.first), given.second};
}

void Memory::take_buffer(nb::handle object, bool writable) {
  if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
    throw nb::python_error();
  }
  bytes_ = {static_cast<std::byte*>(view_.buf), static_cast<std::size_t>(view_.len)};
}

void Memory::take_dlpack(nb::handle object, bool writable) {
  const bool taken = writable ? import_tensor<nb::ndarray<>>(object, bytes_, tensor_)
                              : import_tensor<nb::ndarray<nb::ro>>(object, bytes_, tensor_);
  if (!taken) {
    object.attr("__dlpack__")();  // raises what is wrong with it, if the object knows
    throw wrong_type("this " + class_name(object) + " gives no " + (writable ? "writable " : "") + "DLPack tensor");
  }
}

void bind_memory(nb::module_& module) {
  nb::class_<Memory>(module, "Memory", "Host memory, held for as long as this object lives.")
      .def(nb::init<nb::handle, bool>(), nb::arg("memory"), nb::arg("writable"))
      .def_prop_ro("address", [](const Memory& self) { return reinterpret_cast<std::uintptr_t>(self.bytes().data()); })
      .def_prop_ro("size", [](const Memory& self) { return self.bytes().size(); });

  nb::class_<Region>(
      module, "Region",
      "Memory that a channel offers to its peers, divided into pages of equal size.\n\n"
      "memory: the buffer protocol, DLPack on the CPU, or (address, size), contiguous; its size in bytes is a "
      "multiple of page_size.\npage_size: bytes.\naccess: what peers may do, 'none', 'read', 'write' or "
      "'read_write'.\ndmabuf_fd, dmabuf_offset: for memory of a device, given as (address, size), over RDMA.\n\n"
      "Raises TypeError for what is no memory of the host, BufferError or ValueError for memory that is read "
      "only and that peers may write to.")
      .def(
          "__init__",
          [](Region* self, nb::handle memory, std::size_t page_size, const std::string& access, int dmabuf_fd,
             std::uint64_t dmabuf_offset) {
            const Access peer_access = access_of(access);
            auto [owned, writable] = memory_of_region(memory, peer_access);
            const MutableBuffer bytes = owned->bytes();
            new (self) Region{
                std::move(owned),
                MemoryRegion{bytes.data(), bytes.size(), page_size, peer_access, dmabuf_fd, dmabuf_offset}, writable};
          },
          nb::arg("memory"), nb::arg("page_size"), nb::arg("access") = "read_write", nb::kw_only(),
          nb::arg("dmabuf_fd") = -1, nb::arg("dmabuf_offset") = 0)
      .def_prop_ro("address", [](const Region& self) { return reinterpret_cast<std::uintptr_t>(self.described.data); })
      .def_prop_ro("size", [](const Region& self) { return self.described.size; })
      .def_prop_ro("page_size", [](const Region& self) { return self.described.page_size; })
      .def_prop_ro("page_count", [](const Region& self) { return self.described.page_count(); });
}

}  // namespace kvferry::python
