# SPDX-License-Identifier: Apache-2.0
# Finds the standalone Asio headers, which come with neither a CMake package nor a .pc file.
#
#   Asio::Asio        target: include directory, ASIO_STANDALONE, ASIO_HAS_STD_ALIGNED_ALLOC, threads
#   Asio_FOUND, Asio_VERSION, Asio_INCLUDE_DIR

find_path(Asio_INCLUDE_DIR NAMES asio/version.hpp)
mark_as_advanced(Asio_INCLUDE_DIR)

if(Asio_INCLUDE_DIR)
  file(STRINGS "${Asio_INCLUDE_DIR}/asio/version.hpp" _asio_version REGEX "^#define ASIO_VERSION [0-9]+")
  string(REGEX MATCH "[0-9]+" _asio_version "${_asio_version}")
  math(EXPR _asio_major "${_asio_version} / 100000")
  math(EXPR _asio_minor "${_asio_version} / 100 % 1000")
  math(EXPR _asio_patch "${_asio_version} % 100")
  set(Asio_VERSION "${_asio_major}.${_asio_minor}.${_asio_patch}")
  unset(_asio_version)
  unset(_asio_major)
  unset(_asio_minor)
  unset(_asio_patch)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  Asio
  REQUIRED_VARS Asio_INCLUDE_DIR
  VERSION_VAR Asio_VERSION)

# Left to itself, Asio takes small blocks from std::aligned_alloc if a header of the standard library was included before
# it, and else from operator new; blocks then are given back in a way that they were not taken, which a program notices
# that has an operator new of its own.
if(Asio_FOUND AND NOT TARGET Asio::Asio)
  include(CMakeFindDependencyMacro)
  find_dependency(Threads)
  add_library(Asio::Asio INTERFACE IMPORTED)
  set_target_properties(
    Asio::Asio
    PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${Asio_INCLUDE_DIR}"
               INTERFACE_COMPILE_DEFINITIONS "ASIO_STANDALONE;ASIO_HAS_STD_ALIGNED_ALLOC=1"
               INTERFACE_LINK_LIBRARIES Threads::Threads)
endif()
