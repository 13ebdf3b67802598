// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace kvferry::python {

/// Whether libibverbs is on this host.
[[nodiscard]] bool have_verbs() noexcept;

/// @throws TransferError ENOSYS if it isn't; the sentence has the loader's reason.
void need_verbs();

}  // namespace kvferry::python
