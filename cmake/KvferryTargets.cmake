# SPDX-License-Identifier: Apache-2.0
# What all targets of the project have in common.

set(KVFERRY_COMPONENTS "")

# Warnings, and errors instead of them if asked for; never passed on to those who link the target.
function(kvferry_set_warnings target)
  target_compile_options(
    ${target}
    PRIVATE -Wall
            -Wextra
            -Wpedantic
            -Wshadow
            -Wconversion
            -Wsign-conversion
            -Wnon-virtual-dtor
            -Wold-style-cast)
  set_property(TARGET ${target} PROPERTY COMPILE_WARNING_AS_ERROR ${KVFERRY_WARNINGS_AS_ERRORS})
endfunction()

# Sanitizers are passed on: whoever links an instrumented library needs their runtime.
function(kvferry_set_sanitizers target)
  if(KVFERRY_SANITIZE)
    target_compile_options(${target} PUBLIC -fsanitize=${KVFERRY_SANITIZE} -fno-omit-frame-pointer)
    target_link_options(${target} PUBLIC -fsanitize=${KVFERRY_SANITIZE})
    if(KVFERRY_SANITIZE MATCHES "undefined")
      # The check of dynamic types opens a pipe to find out whether memory can be read, and in a process without
      # descriptors takes its failure for an error of the program.
      target_compile_options(${target} PUBLIC -fno-sanitize-recover=undefined -fno-sanitize=vptr)
    endif()
    if(KVFERRY_SANITIZE MATCHES "thread" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # GCC warns that TSan does not see the fences in Asio's headers.
      target_compile_options(${target} PUBLIC -Wno-tsan)
    endif()
  endif()
  if(KVFERRY_BUILD_FUZZERS)
    target_compile_options(${target} PUBLIC -fsanitize=fuzzer-no-link)
    target_link_options(${target} PUBLIC -fsanitize=fuzzer-no-link)
  endif()
endfunction()

# kvferry_add_component(<name> SOURCES <file>... HEADERS <file>...)
#
# A library kvferry_<name> that is kvferry::<name> here and after installation. Without sources it is header-only.
function(kvferry_add_component name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;HEADERS")
  set(target kvferry_${name})
  if(arg_SOURCES)
    add_library(${target} ${arg_SOURCES})
    set(scope PUBLIC)
    target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/src")
    kvferry_set_warnings(${target})
    set_target_properties(
      ${target}
      PROPERTIES VERSION ${PROJECT_VERSION}
                 SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
                 INSTALL_RPATH "$ORIGIN"
                 # A static library goes into plugins and extension modules, too.
                 POSITION_INDEPENDENT_CODE ON
                 VISIBILITY_INLINES_HIDDEN ON
                 UNITY_BUILD ${KVFERRY_UNITY_BUILD}
                 UNITY_BUILD_BATCH_SIZE 24
                 UNITY_BUILD_CODE_BEFORE_INCLUDE "// NOLINTNEXTLINE(bugprone-suspicious-include)")
    if(KVFERRY_UNITY_BUILD AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
      # GCC takes a source file that another one includes for a header, in which a class must not have members of unnamed namespaces.
      target_compile_options(${target} PRIVATE -Wno-subobject-linkage)
    elseif(KVFERRY_UNITY_BUILD AND CMAKE_CXX_COMPILER_ID STREQUAL "Clang")
      # Names of another file's unnamed namespace; the preset "clang" compiles each file on its own.
      target_compile_options(${target} PRIVATE -Wno-shadow)
    endif()
    if(NOT name STREQUAL "core") # whose internals the transports use
      set_property(TARGET ${target} PROPERTY CXX_VISIBILITY_PRESET hidden)
    endif()
    if(BUILD_SHARED_LIBS)
      target_link_options(${target} PRIVATE "LINKER:--version-script=${PROJECT_SOURCE_DIR}/cmake/exports.map")
      set_property(TARGET ${target} PROPERTY LINK_DEPENDS "${PROJECT_SOURCE_DIR}/cmake/exports.map")
    endif()
  else()
    add_library(${target} INTERFACE)
    set(scope INTERFACE)
  endif()
  add_library(kvferry::${name} ALIAS ${target})
  target_compile_features(${target} ${scope} cxx_std_20)
  target_sources(
    ${target}
    ${scope}
    FILE_SET
    HEADERS
    BASE_DIRS
    "${PROJECT_SOURCE_DIR}/include"
    "${PROJECT_BINARY_DIR}/include"
    FILES
    ${arg_HEADERS})
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${name})
  set(KVFERRY_COMPONENTS
      ${KVFERRY_COMPONENTS} ${name}
      PARENT_SCOPE)
endfunction()
