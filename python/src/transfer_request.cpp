// SPDX-License-Identifier: Apache-2.0
#include "transfer_request.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>

#include "arguments.hpp"

namespace kvferry::python {
namespace {

template <class Value, std::size_t Dimensions>
using Array = nb::ndarray<const Value, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

/// Objects that are pages of this channel's own regions.
struct Pages {
  std::vector<std::uint64_t> indexes;
  std::uint32_t region = 0;
};

/// Objects by address: memory that the caller answers for.
struct Addresses {
  std::vector<MutableBuffer> buffers;
  nb::object owner;
};

/// Rows of numbers: a contiguous array of uint64 of two dimensions.
Array<std::uint64_t, 2> rows_of(nb::handle given, const char* what, std::initializer_list<std::size_t> widths) {
  Array<std::uint64_t, 2> rows;
  if (!nb::try_cast(given, rows, false)) {
    throw wrong_type(std::string(what) + " is a contiguous array of uint64 with two dimensions");
  }
  if (std::ranges::find(widths, rows.shape(1)) == widths.end()) {
    throw wrong_value(std::string(what) + " has rows of " + std::to_string(*widths.begin()) + " numbers, not of " +
                      std::to_string(rows.shape(1)));
  }
  return rows;
}

std::vector<RemoteRange> ranges_of(nb::handle given) {
  const auto rows = rows_of(given, "remote_ranges", {3, 5});
  const std::size_t width = rows.shape(1);
  std::vector<RemoteRange> ranges;
  ranges.reserve(rows.shape(0));
  for (const std::uint64_t *row = rows.data(), *end = row + rows.size(); row != end; row += width) {
    if (row[0] > UINT32_MAX) {
      throw wrong_value("remote_ranges: there is no region " + std::to_string(row[0]));
    }
    const auto region = static_cast<std::uint32_t>(row[0]);
    ranges.push_back(width == 3 ? RemoteRange::contiguous(region, row[1], row[2])
                                : RemoteRange::strided(region, row[1], row[2], row[3], row[4]));
  }
  return ranges;
}

std::vector<LocalStride> strides_of(nb::handle given) {
  const auto rows = rows_of(given, "local_strides", {2});
  std::vector<LocalStride> strides;
  strides.reserve(rows.shape(0));
  for (const std::uint64_t *row = rows.data(), *end = row + rows.size(); row != end; row += 2) {
    strides.push_back({row[0], row[1]});
  }
  return strides;
}

std::vector<MutableBuffer> buffers_of(const Pages& pages, const Regions& own, bool written) {
  const auto found = own.find(pages.region);
  if (found == own.end()) {
    throw wrong_value("Pages: there is no region " + std::to_string(pages.region) + ", the channel has " +
                      std::to_string(own.size()));
  }
  const MemoryRegion& region = found->second.described;
  if (written && !found->second.writable) {
    throw wrong_value("Pages: the memory of region " + std::to_string(pages.region) + " is read only");
  }
  const std::uint64_t count = region.page_count();
  std::vector<MutableBuffer> buffers;
  buffers.reserve(pages.indexes.size());
  for (const std::uint64_t index : pages.indexes) {
    if (index >= count) {
      throw wrong_value("Pages: there is no page " + std::to_string(index) + ", region " +
                        std::to_string(pages.region) + " has " + std::to_string(count));
    }
    buffers.emplace_back(region.data + index * region.page_size, region.page_size);
  }
  return buffers;
}

/// Whether it is a sequence whose elements can be objects: a buffer or a tensor is one object, of which nobody says how it
/// is divided.
bool is_of_memory(nb::handle given) {
  return nb::isinstance<nb::sequence>(given) && PyObject_CheckBuffer(given.ptr()) == 0 &&
         !nb::isinstance<nb::str>(given) && attribute(given, "__dlpack__").is_none();
}

std::vector<MutableBuffer> objects_of(nb::handle given, bool written, const Regions& own, Operation& operation) {
  std::vector<nb::object>& kept = operation.kept;
  if (nb::isinstance<Pages>(given)) {
    const auto& pages = nb::cast<const Pages&>(given);
    auto buffers = buffers_of(pages, own, written);
    operation.kept_region = own.at(pages.region).memory;  // the region may be removed meanwhile
    return buffers;
  }
  if (nb::isinstance<Addresses>(given)) {
    const auto& addresses = nb::cast<const Addresses&>(given);
    kept.push_back(addresses.owner);
    return addresses.buffers;
  }
  const bool has_elements = nb::isinstance<nb::list>(given) || nb::isinstance<nb::tuple>(given) || is_of_memory(given);
  if (!has_elements) {
    throw wrong_type("objects are a sequence of memory, Pages or Addresses, not one '" +
                     nb::cast<std::string>(given.type().attr("__name__")) + "'");
  }
  const nb::object objects = nb::steal(PySequence_Fast(given.ptr(), "objects are a sequence of memory"));
  if (!objects.is_valid()) {
    throw nb::python_error();
  }
  std::vector<MutableBuffer> buffers;
  buffers.reserve(nb::len(objects));
  kept.reserve(nb::len(objects));
  for (const nb::handle object : objects) {
    auto memory = std::make_unique<Memory>(object, written);
    buffers.push_back(memory->bytes());
    kept.push_back(nb::cast(memory.release(), nb::rv_policy::take_ownership));
  }
  return buffers;
}

}  // namespace

std::vector<std::uint64_t> indexes_of(nb::handle given, const char* what) {
  Array<std::uint64_t, 1> array;
  if (nb::try_cast(given, array, false)) {
    return {array.data(), array.data() + array.size()};
  }
  Array<std::int64_t, 1> with_sign;
  if (nb::try_cast(given, with_sign, false)) {
    std::vector<std::uint64_t> indexes(with_sign.data(), with_sign.data() + with_sign.size());
    const auto negative = std::find_if(indexes.begin(), indexes.end(), [](std::uint64_t i) { return i > INT64_MAX; });
    if (negative != indexes.end()) {
      throw wrong_value(std::string(what) + ": " + std::to_string(static_cast<std::int64_t>(*negative)) +
                        " is negative");
    }
    return indexes;
  }
  std::vector<std::uint64_t> indexes;
  if (!nb::isinstance<nb::sequence>(given) || !nb::try_cast(given, indexes, true)) {
    throw wrong_type(std::string(what) +
                     " is a contiguous array of uint64 or int64, or a sequence of integers from 0 on");
  }
  return indexes;
}

TransferKind kind_of(std::string_view name) {
  for (const auto kind : {TransferKind::send, TransferKind::recv, TransferKind::write, TransferKind::read}) {
    if (name == to_string(kind)) {
      return kind;
    }
  }
  throw wrong_value("there is no transfer '" + std::string(name) + "'");
}

TransferRequest make_request(TransferKind kind, nb::handle objects, std::string peer_id, const nb::dict& spec,
                             const Regions& own, Operation& operation) {
  const bool written = kind == TransferKind::read || kind == TransferKind::recv;
  TransferRequest request;
  request.kind = kind;
  request.peer_id = std::move(peer_id);
  request.objects = objects_of(objects, written, own, operation);

  Arguments arguments(spec);
  if (request.one_sided()) {
    if (const nb::object indexes = arguments.take("remote_indexes"); indexes.is_valid()) {
      request.remote_indexes = indexes_of(indexes, "remote_indexes");
    }
    if (const nb::object ranges = arguments.take("remote_ranges"); ranges.is_valid()) {
      request.remote_ranges = ranges_of(ranges);
    }
    if (const nb::object strides = arguments.take("local_strides"); strides.is_valid()) {
      request.local_strides = strides_of(strides);
    }
    arguments.read("remote_region", request.remote_region);
    nb::bytes notification("", 0);
    arguments.read("notification", notification);
    const auto payload = bytes_of(notification);
    request.notification.assign(payload.begin(), payload.end());
    arguments.read("notification_key", request.notification_key);
  } else {
    arguments.read("tag", request.tag);
  }
  arguments.read("incarnation", request.incarnation);
  if (bool checksums = false; arguments.read("checksums", checksums)) {
    request.checksums = checksums;
  }
  std::optional<double> timeout;
  arguments.read("timeout", timeout);
  request.timeout = timeout_of(timeout);
  bool statuses = false;
  arguments.read("statuses", statuses);
  arguments.finish(operation.name.c_str());

  if (statuses) {
    operation.statuses.resize(request.objects.size());
    request.statuses = operation.statuses;
  }
  if (kind == TransferKind::recv) {
    operation.sizes.resize(request.objects.size());
    request.sizes = operation.sizes;
  }
  request.diagnostic = &operation.diagnostic;
  return request;
}

void bind_descriptors(nb::module_& module) {
  nb::class_<Pages>(
      module, "Pages",
      "Pages of one of the channel's own regions, as the objects of a batch.\n\n"
      "indexes: page numbers, an array of uint64 or int64 of one dimension, or a sequence of ints; copied.")
      .def(
          "__init__",
          [](Pages* self, nb::handle indexes, std::uint32_t region) {
            new (self) Pages{indexes_of(indexes, "indexes"), region};
          },
          nb::arg("indexes"), nb::arg("region") = 0)
      .def("__len__", [](const Pages& self) { return self.indexes.size(); });

  nb::class_<Addresses>(
      module, "Addresses",
      "Memory by address, as the objects of a batch; it has to stay until the operation has ended.\n\n"
      "rows: an array of uint64 of shape (objects, 2): address, size in bytes; copied.\n"
      "owner: an object that is held until the operation has ended.")
      .def(
          "__init__",
          [](Addresses* self, nb::handle rows, nb::object owner) {
            const auto given = rows_of(rows, "rows", {2});
            std::vector<MutableBuffer> buffers;
            buffers.reserve(given.shape(0));
            for (const std::uint64_t *row = given.data(), *end = row + given.size(); row != end; row += 2) {
              // NOLINTNEXTLINE(performance-no-int-to-ptr): this is what the caller asks for
              buffers.emplace_back(reinterpret_cast<std::byte*>(row[0]), row[1]);
            }
            new (self) Addresses{std::move(buffers), std::move(owner)};
          },
          nb::arg("rows"), nb::kw_only(), nb::arg("owner").none() = nb::none())
      .def("__len__", [](const Addresses& self) { return self.buffers.size(); });
}

}  // namespace kvferry::python
