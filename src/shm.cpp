// SPDX-License-Identifier: Apache-2.0
#include <kvferry/shm-inl.hpp>
