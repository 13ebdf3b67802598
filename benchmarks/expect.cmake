# SPDX-License-Identifier: Apache-2.0
# cmake -DCODE=<exit code> -DOUTPUT=<regular expression> -P expect.cmake -- <program> <argument>...
#
# Fails unless the program ends by itself with this code, having said something of the kind. (Of a test with a
# PASS_REGULAR_EXPRESSION, ctest doesn't look at the exit code.)
set(command "")
set(is_command FALSE)
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(i RANGE ${last})
  if(is_command)
    list(APPEND command "${CMAKE_ARGV${i}}")
  elseif(CMAKE_ARGV${i} STREQUAL "--")
    set(is_command TRUE)
  endif()
endforeach()
execute_process(
  COMMAND ${command}
  RESULT_VARIABLE code
  OUTPUT_VARIABLE output
  ERROR_VARIABLE output)
message("${output}")
if(NOT code STREQUAL CODE)
  message(FATAL_ERROR "it ended with \"${code}\", not with ${CODE}")
elseif(NOT output MATCHES "${OUTPUT}")
  message(FATAL_ERROR "it didn't say \"${OUTPUT}\"")
endif()
