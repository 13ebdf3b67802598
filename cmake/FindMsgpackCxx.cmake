# SPDX-License-Identifier: Apache-2.0
# Finds the headers of msgpack-cxx. Its own CMake package asks for Boost, which kvferry's header makes needless.
#
#   MsgpackCxx::MsgpackCxx  target: include directory
#   MsgpackCxx_FOUND, MsgpackCxx_VERSION, MsgpackCxx_INCLUDE_DIR

find_path(MsgpackCxx_INCLUDE_DIR NAMES msgpack/version_master.hpp)
mark_as_advanced(MsgpackCxx_INCLUDE_DIR)

if(MsgpackCxx_INCLUDE_DIR)
  file(STRINGS "${MsgpackCxx_INCLUDE_DIR}/msgpack/version_master.hpp" _msgpack_version
       REGEX "^#define MSGPACK_VERSION_")
  string(REGEX REPLACE ".*MAJOR +([0-9]+).*MINOR +([0-9]+).*REVISION +([0-9]+).*" "\\1.\\2.\\3" MsgpackCxx_VERSION
                       "${_msgpack_version}")
  unset(_msgpack_version)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  MsgpackCxx
  REQUIRED_VARS MsgpackCxx_INCLUDE_DIR
  VERSION_VAR MsgpackCxx_VERSION)

if(MsgpackCxx_FOUND AND NOT TARGET MsgpackCxx::MsgpackCxx)
  add_library(MsgpackCxx::MsgpackCxx INTERFACE IMPORTED)
  set_target_properties(
    MsgpackCxx::MsgpackCxx
    PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${MsgpackCxx_INCLUDE_DIR}")
endif()
