# SPDX-License-Identifier: Apache-2.0
# An overlay port, which builds the checkout that it is in: vcpkg install kvferry --overlay-ports=packaging/vcpkg/ports

cmake_path(ABSOLUTE_PATH CURRENT_PORT_DIR NORMALIZE OUTPUT_VARIABLE SOURCE_PATH)
foreach(_ RANGE 3)
  cmake_path(GET SOURCE_PATH PARENT_PATH SOURCE_PATH)
endforeach()

vcpkg_check_features(OUT_FEATURE_OPTIONS features FEATURES rdma KVFERRY_WITH_RDMA)
vcpkg_cmake_configure(
  SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS ${features}
          -DKVFERRY_WITH_TLS=ON
          -DKVFERRY_BUILD_TESTS=OFF
          -DKVFERRY_BUILD_EXAMPLES=OFF
          -DKVFERRY_BUILD_BENCHMARKS=OFF
          -DKVFERRY_BUILD_TOOLS=OFF
          -DKVFERRY_UNITY_BUILD=ON
          -DKVFERRY_WARNINGS_AS_ERRORS=OFF)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(CONFIG_PATH lib/cmake/kvferry)
vcpkg_fixup_pkgconfig()
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/debug/include")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
