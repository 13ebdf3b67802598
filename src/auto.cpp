// SPDX-License-Identifier: Apache-2.0
#include <kvferry/auto-inl.hpp>
