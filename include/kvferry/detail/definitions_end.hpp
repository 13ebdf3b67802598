// SPDX-License-Identifier: Apache-2.0
// Without an include guard: see definitions_begin.hpp.
#pragma pop_macro("min")
#pragma pop_macro("max")
#pragma pop_macro("check")
#pragma pop_macro("emit")
#pragma pop_macro("foreach")
#pragma pop_macro("interface")
#pragma pop_macro("signals")
#pragma pop_macro("slots")
#pragma pop_macro("small")
