// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include <kvferry/memory_region.hpp>
#include <kvferry/transfer_spec.hpp>

namespace kvferry::python {

namespace nb = nanobind;

/// Bytes of host memory and what keeps them: an exported buffer, a DLPack tensor, or nothing where the caller gave an
/// address. To be used and destroyed with the GIL.
class Memory {
 public:
  /// @param object with the buffer protocol or DLPack, or (address, size).
  /// @param writable whether it is going to be written to: memory that is read only is refused.
  /// @throws nb::type_error memory of a device, memory that isn't contiguous, no memory at all; nb::value_error and
  ///   Python's BufferError as the object raises them.
  Memory(nb::handle object, bool writable);
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();

  [[nodiscard]] MutableBuffer bytes() const noexcept { return bytes_; }

 private:
  void take_address(nb::handle object);
  void take_buffer(nb::handle object, bool writable);
  void take_dlpack(nb::handle object, bool writable);

  MutableBuffer bytes_;
  Py_buffer view_{};
  std::shared_ptr<void> tensor_;
};

/// A region as Python describes it.
struct Region {
  std::shared_ptr<Memory> memory;
  MemoryRegion described;
  /// Whether this side may read into it. Memory that is read only can be offered for reading.
  bool writable = true;
};

/// The regions of a channel, by number.
using Regions = std::map<std::uint32_t, Region>;

void bind_memory(nb::module_& module);

}  // namespace kvferry::python
