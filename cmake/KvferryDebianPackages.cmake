# SPDX-License-Identifier: Apache-2.0
# What `cpack` makes, in a configured build: a Debian package for what a built program needs, if libraries are shared, and one
# for development. packaging/try_debian_packages.sh makes them and tries them in a clean system.

set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_VENDOR kvferry)
set(CPACK_PACKAGE_CONTACT "The kvferry maintainers")
set(CPACK_RESOURCE_FILE_LICENSE "${PROJECT_SOURCE_DIR}/LICENSE")
set(CPACK_PACKAGING_INSTALL_PREFIX "/usr")
set(CPACK_STRIP_FILES ON)

set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_COMPONENTS_ALL development)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_DESCRIPTION "${PROJECT_DESCRIPTION}")

set(_soname "${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}") # a minor version may change the interface
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_NAME libkvferry-dev)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SECTION libdevel)
set(_development_needs libasio-dev libmsgpack-cxx-dev cppzmq-dev libzmq3-dev libxxhash-dev)
if(KVFERRY_HAS_TLS)
  list(APPEND _development_needs libssl-dev)
endif()
if(KVFERRY_HAS_RDMA)
  list(APPEND _development_needs libibverbs-dev)
endif()
if(BUILD_SHARED_LIBS)
  list(APPEND CPACK_COMPONENTS_ALL runtime)
  set(CPACK_DEBIAN_RUNTIME_PACKAGE_NAME "libkvferry${_soname}")
  set(CPACK_DEBIAN_RUNTIME_PACKAGE_SECTION libs)
  set(CPACK_DEBIAN_RUNTIME_PACKAGE_SHLIBDEPS ON)
  list(APPEND _development_needs "libkvferry${_soname} (= ${PROJECT_VERSION})")
endif()
list(JOIN _development_needs ", " CPACK_DEBIAN_DEVELOPMENT_PACKAGE_DEPENDS)
include(CPack)
