# SPDX-License-Identifier: Apache-2.0
# cmake -DLIBRARIES=<dir> -DNM=<nm> -P check_symbols.cmake: what the shared libraries there export is kvferry's own, but for
# the static data that Asio's headers must have once in a process.
file(GLOB libraries "${LIBRARIES}/libkvferry_*.so")
if(NOT libraries)
  message(FATAL_ERROR "no shared libraries in ${LIBRARIES}")
endif()
foreach(library IN LISTS libraries)
  execute_process(
    COMMAND "${NM}" --dynamic --defined-only --format=posix "${library}"
    OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
  set(own 0)
  foreach(symbol IN LISTS symbols)
    if(symbol MATCHES "^_Z[A-Za-z0-9_]*7kvferry")
      math(EXPR own "${own} + 1")
    elseif(NOT symbol MATCHES "^_Z(Z|GVZ)?N4asio[^ ]* [uVvBbDdWRr] ")
      message(SEND_ERROR "${library} exports ${symbol}")
    endif()
  endforeach()
  if(own EQUAL 0)
    message(SEND_ERROR "${library} exports nothing of kvferry's")
  endif()
endforeach()
