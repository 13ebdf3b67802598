# SPDX-License-Identifier: Apache-2.0
# What `cmake --install` puts where: libraries, headers, a .pc file, and the CMake package with an export set for each
# component.

include(CMakePackageConfigHelpers)

# Parts that can be installed by themselves: "runtime", what a built program needs; "tools"; and "development", all else.
set(CMAKE_INSTALL_DEFAULT_COMPONENT_NAME development)

set(_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/kvferry")

foreach(component IN LISTS KVFERRY_COMPONENTS)
  install(
    TARGETS kvferry_${component}
    EXPORT kvferry_${component}
    RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}"
    LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}"
            COMPONENT runtime
            NAMELINK_COMPONENT development
    ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}"
    FILE_SET HEADERS
    DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
  install(
    EXPORT kvferry_${component}
    NAMESPACE kvferry::
    FILE kvferry_${component}.cmake
    DESTINATION "${_package_dir}")
endforeach()

# The definitions, and the headers that only they include.
install(
  DIRECTORY "${PROJECT_SOURCE_DIR}/include/kvferry"
  DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
  FILES_MATCHING
  PATTERN "*-inl.hpp"
  PATTERN "kvferry/detail/*.hpp"
  PATTERN "kvferry/handshake/*.hpp"
  PATTERN "kvferry/tcp/*.hpp"
  PATTERN "kvferry/shm/*.hpp"
  PATTERN "kvferry/auto/*.hpp"
  PATTERN "kvferry/testing" EXCLUDE)

configure_package_config_file(cmake/kvferryConfig.cmake.in kvferryConfig.cmake INSTALL_DESTINATION "${_package_dir}")
write_basic_package_version_file(kvferryConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/kvferryConfig.cmake" "${PROJECT_BINARY_DIR}/kvferryConfigVersion.cmake"
              cmake/FindAsio.cmake cmake/FindIbverbs.cmake cmake/FindMsgpackCxx.cmake cmake/FindXxHash.cmake DESTINATION "${_package_dir}")

# kvferry_pc_library(<variable> <library>): how the linker finds it, in a .pc file. Not by "Requires": with --static that
# would bring what Debian's libzmq.pc asks for, of which some can't be linked.
function(kvferry_pc_library variable library)
  get_filename_component(folder "${library}" DIRECTORY)
  get_filename_component(name "${library}" NAME_WE)
  string(REGEX REPLACE "^lib" "-l" option "${name}")
  if(NOT folder IN_LIST CMAKE_CXX_IMPLICIT_LINK_DIRECTORIES)
    string(PREPEND option "-L${folder} ")
  endif()
  set(${variable}
      "${option}"
      PARENT_SCOPE)
endfunction()

# A static kvferry needs ZeroMQ from whoever links it, a shared one has it linked.
set(_pc_scope "LIBS")
if(BUILD_SHARED_LIBS)
  set(_pc_scope "PRIVATE_LIBS")
endif()
find_library(KVFERRY_ZMQ_LIBRARY zmq REQUIRED)
mark_as_advanced(KVFERRY_ZMQ_LIBRARY)
kvferry_pc_library(KVFERRY_PC_${_pc_scope} "${KVFERRY_ZMQ_LIBRARY}")
if(KVFERRY_HAS_TLS)
  foreach(_library IN ITEMS "${OPENSSL_SSL_LIBRARY}" "${OPENSSL_CRYPTO_LIBRARY}")
    kvferry_pc_library(_option "${_library}")
    string(APPEND KVFERRY_PC_${_pc_scope} " ${_option}")
  endforeach()
endif()
if(KVFERRY_HAS_RDMA)
  kvferry_pc_library(KVFERRY_PC_RDMA_${_pc_scope} "${Ibverbs_LIBRARY}")
endif()
get_target_property(KVFERRY_PC_DEFINITIONS Asio::Asio INTERFACE_COMPILE_DEFINITIONS)
list(TRANSFORM KVFERRY_PC_DEFINITIONS PREPEND "-D")
list(JOIN KVFERRY_PC_DEFINITIONS " " KVFERRY_PC_DEFINITIONS)
# Relative to the file's own place, so that it holds after `cmake --install --prefix`.
file(RELATIVE_PATH KVFERRY_PC_PREFIX "${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig" "${CMAKE_INSTALL_PREFIX}")
string(REGEX REPLACE "/$" "" KVFERRY_PC_PREFIX "${KVFERRY_PC_PREFIX}")
cmake_path(APPEND KVFERRY_PC_LIBDIR "\${prefix}" "${CMAKE_INSTALL_LIBDIR}")
cmake_path(APPEND KVFERRY_PC_INCLUDEDIR "\${prefix}" "${CMAKE_INSTALL_INCLUDEDIR}")
configure_file(cmake/kvferry.pc.in kvferry.pc @ONLY)
set(_pc_files "${PROJECT_BINARY_DIR}/kvferry.pc")
if(KVFERRY_HAS_RDMA)
  configure_file(cmake/kvferry-rdma.pc.in kvferry-rdma.pc @ONLY)
  list(APPEND _pc_files "${PROJECT_BINARY_DIR}/kvferry-rdma.pc")
endif()
install(FILES ${_pc_files} DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
