# SPDX-License-Identifier: Apache-2.0
# Finds libibverbs, which comes with a .pc file only.
#
#   Ibverbs::Ibverbs  target
#   Ibverbs_FOUND, Ibverbs_VERSION, Ibverbs_INCLUDE_DIR, Ibverbs_LIBRARY

find_package(PkgConfig QUIET)
if(PkgConfig_FOUND)
  pkg_check_modules(PC_Ibverbs QUIET libibverbs)
  set(Ibverbs_VERSION ${PC_Ibverbs_VERSION})
endif()
find_path(
  Ibverbs_INCLUDE_DIR
  NAMES infiniband/verbs.h
  HINTS ${PC_Ibverbs_INCLUDE_DIRS})
find_library(
  Ibverbs_LIBRARY
  NAMES ibverbs
  HINTS ${PC_Ibverbs_LIBRARY_DIRS})
mark_as_advanced(Ibverbs_INCLUDE_DIR Ibverbs_LIBRARY)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  Ibverbs
  REQUIRED_VARS Ibverbs_LIBRARY Ibverbs_INCLUDE_DIR
  VERSION_VAR Ibverbs_VERSION)

if(Ibverbs_FOUND AND NOT TARGET Ibverbs::Ibverbs)
  add_library(Ibverbs::Ibverbs UNKNOWN IMPORTED)
  set_target_properties(Ibverbs::Ibverbs PROPERTIES IMPORTED_LOCATION "${Ibverbs_LIBRARY}"
                                                    INTERFACE_INCLUDE_DIRECTORIES "${Ibverbs_INCLUDE_DIR}")
endif()
