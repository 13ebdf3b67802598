// SPDX-License-Identifier: Apache-2.0
// Without an include guard. Stands before definitions that a program compiles: macros of the program with common names mean
// nothing in them, nor in other libraries' headers that they include first. `definitions_end.hpp` brings them back.
#pragma push_macro("min")
#pragma push_macro("max")
#pragma push_macro("check")
#pragma push_macro("emit")
#pragma push_macro("foreach")
#pragma push_macro("interface")
#pragma push_macro("signals")
#pragma push_macro("slots")
#pragma push_macro("small")
#undef min
#undef max
#undef check
#undef emit
#undef foreach
#undef interface
#undef signals
#undef slots
#undef small
