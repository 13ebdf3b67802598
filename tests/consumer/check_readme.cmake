# SPDX-License-Identifier: Apache-2.0
# cmake -DREADME=<file> -DSOURCE=<file> -P check_readme.cmake: the README's program is the one that the tests build.
file(READ "${README}" readme)
file(READ "${SOURCE}" source)
string(FIND "${readme}" "```cpp\n" begin)
string(SUBSTRING "${readme}" ${begin} -1 readme)
string(FIND "${readme}" "\n```\n" end)
string(SUBSTRING "${readme}" 0 ${end} readme)
string(REPLACE "```cpp\n" "" readme "${readme}\n")
string(REPLACE "// SPDX-License-Identifier: Apache-2.0\n" "" source "${source}")
if(NOT readme STREQUAL source)
  message(FATAL_ERROR "The program in ${README} differs from ${SOURCE}")
endif()
