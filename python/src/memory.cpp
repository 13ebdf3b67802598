// SPDX-License-Identifier: Apache-2.0
#include "memory.hpp"

#include <kvferry/shared_region.hpp>

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

/// Whether a buffer's format, as that of the `struct` module, has references to objects.
bool has_objects(std::string_view format) {
  bool in_name = false;  // of a field, between colons
  for (const char c : format) {
    in_name = in_name != (c == ':');
    if (!in_name && c == 'O') {
      return true;
    }
  }
  return false;
}

/// As far as NumPy, which has types that no format tells of, says so by an array's type.
bool has_objects(nb::handle exporter) {
  const nb::object has = attribute(attribute(exporter, "dtype"), "hasobject");
  const int truth = PyObject_IsTrue(has.ptr());
  if (truth < 0) {
    throw nb::python_error();
  }
  return truth == 1;
}

/// @return false if `object` has no such buffer. @throws nb::python_error what else its code raises, as a signal's handler does.
bool get_buffer(nb::handle object, Py_buffer& view, int flags) {
  if (PyObject_GetBuffer(object.ptr(), &view, flags) == 0) {
    return true;
  }
  nb::python_error raised;
  if (raised.matches(PyExc_BufferError) || raised.matches(PyExc_ValueError)) {
    return false;
  }
  throw raised;
}

/// One element of (address, size), by `__index__`.
std::uint64_t number_of(nb::handle given) {
  const nb::object number = nb::steal(PyNumber_Index(given.ptr()));
  if (!number.is_valid()) {
    nb::python_error raised;
    if (raised.matches(PyExc_TypeError)) {
      throw nb::type_error("memory by its address is a tuple of two integers, (address, size)");
    }
    throw raised;
  }
  const auto value = PyLong_AsUnsignedLongLong(number.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw wrong_value("memory's address and size have 64 bits and no sign: " + nb::cast<std::string>(nb::repr(number)) +
                      " is none");
  }
  return value;
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
    } catch (const nb::python_error& raised) {
      if (!raised.matches(PyExc_Exception)) {  // Ctrl-C, say
        throw;
      }
    } catch (const nb::builtin_exception&) {
    }
    return {std::make_shared<Memory>(memory, false), false};
  }
  return {std::make_shared<Memory>(memory, true), true};
}

/// Who has the view has the object: memory goes when nobody uses it any more.
int give_buffer(PyObject* object, Py_buffer* view, int flags) {
  if (!nb::inst_ready(object)) {
    view->obj = nullptr;
    PyErr_SetString(PyExc_BufferError, "this SharedRegion's __init__ has not run");
    return -1;
  }
  const SharedRegion& region = *nb::inst_ptr<SharedRegion>(nb::handle(object));
  return PyBuffer_FillInfo(view, object, region.data(), static_cast<Py_ssize_t>(region.size()), 0, flags);
}

void bind_shared_region(nb::module_& module) {
  static PyType_Slot slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(give_buffer)}, {0, nullptr}};
  nb::class_<SharedRegion>(
      module, "SharedRegion", nb::type_slots(slots),
      "Memory of zeros that an ShmTransferChannel hands to peers of the same host, which map it: bytes are then copied "
      "once, by the CPU.\n\n"
      "size: bytes.\nhuge_pages: in pages of the system's default huge size, which the administrator has set aside.\n\n"
      "It has the buffer protocol: memoryview(shared), numpy.frombuffer(shared). A region of a channel is handed out "
      "if it is the whole of one and grants reading. Peers never write there: writes of theirs are copied by this "
      "side's channel. With other transports it is memory like any other. Channels and views hold it; forked children "
      "share it.\n\n"
      "Raises TransferError: \"invalid_region\" for a size of 0, \"ENOMEM\" or \"ENOSPC\" where there is no such "
      "memory, and what else the system says.")
      .def(
          "__init__",
          [](SharedRegion* self, std::size_t size, bool huge_pages) {
            const Released released;  // all of it is written
            new (self) SharedRegion(size, huge_pages ? HugePages::yes : HugePages::no);
          },
          nb::arg("size"), nb::kw_only(), nb::arg("huge_pages") = false)
      .def_prop_ro("address", [](const SharedRegion& self) { return reinterpret_cast<std::uintptr_t>(self.data()); })
      .def_prop_ro("size", &SharedRegion::size)
      .def("__len__", &SharedRegion::size);
}

}  // namespace

Memory::Memory(nb::handle object, bool writable) {
  const IntoPython calling;
  if (!attribute(object, "__dlpack_device__").is_none()) {
    check_device(object);
  }
  if (nb::isinstance<nb::tuple>(object)) {
    take_address(object);
  } else if (PyObject_CheckBuffer(object.ptr()) != 0) {
    take_buffer(object, writable);
  } else if (!attribute(object, "__dlpack__").is_none()) {
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
  const auto given = nb::borrow<nb::tuple>(object);
  if (given.size() != 2) {
    throw nb::type_error("memory by its address is a tuple of two integers, (address, size)");
  }
  const std::uint64_t address = number_of(given[0]);
  // NOLINTNEXTLINE(performance-no-int-to-ptr): this is what the caller asks for
  bytes_ = {reinterpret_cast<std::byte*>(address), number_of(given[1])};
}

void Memory::take_buffer(nb::handle object, bool writable) {
  const int flags = writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
  // A memoryview tells its format to those only who ask for the shape, too. Without strides the bytes lie end to end.
  if (!get_buffer(object, view_, flags | PyBUF_ND | PyBUF_FORMAT) &&
      PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
    throw nb::python_error();
  }
  try {
    if (view_.format != nullptr ? has_objects(std::string_view(view_.format))
                                : has_objects(view_.obj != nullptr ? nb::handle(view_.obj) : object)) {
      throw wrong_type("this " + class_name(object) +
                       " is made of references to objects, which mean nothing to a peer");
    }
  } catch (...) {
    PyBuffer_Release(&view_);
    throw;
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
  bind_shared_region(module);
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
