# SPDX-License-Identifier: Apache-2.0
# cmake -DPROGRAM=<file> -DNAME=<prefix> -DOUTPUT=<file> -DPROPERTIES=<words> -DENVIRONMENT=<A=a|B=b>
#   -DOWN_PROCESSES=<bool> -P discover_suites.cmake
#
# Writes, for ctest, one test for each test suite in a GoogleTest program. Suites of many tests are cut into shards, and of
# those whose name ends in OwnProcess each test is one by itself, as is each of a program with OWN_PROCESSES.
set(_most 20) # tests in a shard

execute_process(
  COMMAND "${PROGRAM}" --gtest_list_tests
  OUTPUT_VARIABLE _listing
  TIMEOUT 60
  COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE "\n" ";" _listing "${_listing}")

set(_script "")
string(REPLACE "|" ";" _environment "${ENVIRONMENT}")
# add(<name> <filter> <variable>=<value>...)
function(add name filter)
  set(environment ${_environment} ${ARGN})
  string(APPEND _script "add_test([==[${name}]==] [==[${PROGRAM}]==] [==[--gtest_filter=${filter}]==])\n"
                        "set_tests_properties([==[${name}]==] PROPERTIES ${PROPERTIES} ENVIRONMENT [==[${environment}]==])\n")
  set(_script
      "${_script}"
      PARENT_SCOPE)
endfunction()

macro(add_suite)
  list(LENGTH _tests _count)
  if(_count AND (OWN_PROCESSES OR _suite MATCHES "OwnProcess(/|$)"))
    foreach(_test IN LISTS _tests)
      add("${NAME}.${_suite}.${_test}" "${_suite}.${_test}")
    endforeach()
  elseif(_count GREATER _most)
    math(EXPR _shards "(${_count} + ${_most} - 1) / ${_most}")
    foreach(_shard RANGE 1 ${_shards})
      math(EXPR _index "${_shard} - 1")
      add("${NAME}.${_suite} (${_shard} of ${_shards})" "${_suite}.*" GTEST_TOTAL_SHARDS=${_shards}
          GTEST_SHARD_INDEX=${_index})
    endforeach()
  elseif(_count)
    add("${NAME}.${_suite}" "${_suite}.*")
  endif()
endmacro()

set(_tests "")
foreach(_line IN LISTS _listing)
  string(REGEX REPLACE " *#.*" "" _line "${_line}")
  if(_line MATCHES "^  ([^ ]+)$")
    set(_test "${CMAKE_MATCH_1}")
    if(NOT _test MATCHES "^DISABLED_")
      list(APPEND _tests "${_test}")
    endif()
  elseif(_line MATCHES "^([^ ]+)\\.$")
    set(_next "${CMAKE_MATCH_1}")
    add_suite()
    set(_tests "")
    set(_suite "${_next}")
  endif()
endforeach()
add_suite()
if(_script STREQUAL "")
  message(FATAL_ERROR "${PROGRAM} has no tests")
endif()
file(WRITE "${OUTPUT}" "${_script}")
