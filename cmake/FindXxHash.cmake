# SPDX-License-Identifier: Apache-2.0
# Finds the header of xxHash, all of which kvferry compiles into its own files: there is nothing to link.
#
#   XxHash::XxHash  target: include directory
#   XxHash_FOUND, XxHash_VERSION, XxHash_INCLUDE_DIR

find_path(XxHash_INCLUDE_DIR NAMES xxhash.h)
mark_as_advanced(XxHash_INCLUDE_DIR)

if(XxHash_INCLUDE_DIR)
  file(STRINGS "${XxHash_INCLUDE_DIR}/xxhash.h" _xxhash_version REGEX "^#define XXH_VERSION_(MAJOR|MINOR|RELEASE) ")
  string(REGEX REPLACE ".*MAJOR +([0-9]+).*MINOR +([0-9]+).*RELEASE +([0-9]+).*" "\\1.\\2.\\3" XxHash_VERSION
                       "${_xxhash_version}")
  unset(_xxhash_version)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  XxHash
  REQUIRED_VARS XxHash_INCLUDE_DIR
  VERSION_VAR XxHash_VERSION)

if(XxHash_FOUND AND NOT TARGET XxHash::XxHash)
  add_library(XxHash::XxHash INTERFACE IMPORTED)
  set_target_properties(
    XxHash::XxHash
    PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${XxHash_INCLUDE_DIR}")
endif()
