# SPDX-License-Identifier: Apache-2.0
# Which file belongs to which target, all in one place.

set(_include "${PROJECT_SOURCE_DIR}/include/kvferry")
set(_src "${PROJECT_SOURCE_DIR}/src")
set(_tests "${PROJECT_SOURCE_DIR}/tests")

# What a program may include. The definitions (`-inl.hpp`) and what only they need are installed with them.
file(GLOB KVFERRY_TCP_HEADERS CONFIGURE_DEPENDS "${_include}/tcp_*.hpp")
file(GLOB KVFERRY_SHM_HEADERS CONFIGURE_DEPENDS "${_include}/shm_*.hpp" "${_include}/shared_region.hpp")
file(GLOB KVFERRY_AUTO_HEADERS CONFIGURE_DEPENDS "${_include}/auto_*.hpp")
file(GLOB KVFERRY_RDMA_HEADERS CONFIGURE_DEPENDS "${_include}/rdma_*.hpp")
file(GLOB KVFERRY_CORE_HEADERS CONFIGURE_DEPENDS "${_include}/*.hpp" "${_include}/kit/*.hpp")
list(FILTER KVFERRY_CORE_HEADERS EXCLUDE REGEX "/((tcp|shm|auto|rdma)_[a-z_]+|shared_region)\\.hpp$")
list(FILTER KVFERRY_CORE_HEADERS EXCLUDE REGEX "-inl\\.hpp$")
list(FILTER KVFERRY_TCP_HEADERS EXCLUDE REGEX "-inl\\.hpp$")
list(FILTER KVFERRY_SHM_HEADERS EXCLUDE REGEX "-inl\\.hpp$")
list(FILTER KVFERRY_AUTO_HEADERS EXCLUDE REGEX "-inl\\.hpp$")
file(GLOB KVFERRY_TESTING_HEADERS CONFIGURE_DEPENDS "${_include}/testing/*.hpp")

set(KVFERRY_CORE_SOURCES "${_src}/interface.cpp" "${_src}/handshake.cpp" "${_src}/kit.cpp")
set(KVFERRY_TCP_SOURCES "${_src}/tcp.cpp")
set(KVFERRY_SHM_SOURCES "${_src}/shm.cpp")
set(KVFERRY_AUTO_SOURCES "${_src}/auto.cpp")
file(GLOB KVFERRY_RDMA_SOURCES CONFIGURE_DEPENDS "${_src}/rdma/*.cpp")

file(GLOB KVFERRY_EXAMPLES CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/examples/peer_pair/*_peer.cpp")
file(GLOB KVFERRY_EXAMPLE_SUPPORT CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/examples/peer_pair/*.cpp")
list(FILTER KVFERRY_EXAMPLE_SUPPORT EXCLUDE REGEX "_peer\\.cpp$")
file(GLOB KVFERRY_BENCH_SUPPORT CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/benchmarks/common/*.cpp")
file(GLOB KVFERRY_TRANSFER_BENCH CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/benchmarks/transfer_bench.cpp"
     "${PROJECT_SOURCE_DIR}/benchmarks/transfer/*.cpp")
file(GLOB KVFERRY_RAW_SOCKET_BENCH CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/benchmarks/raw_socket_bench.cpp"
     "${PROJECT_SOURCE_DIR}/benchmarks/raw/*.cpp")
file(GLOB KVFERRY_FUZZERS CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/fuzz/*.cpp")

file(GLOB KVFERRY_CORE_TESTS CONFIGURE_DEPENDS "${_tests}/core/*.cpp" "${_tests}/core/kit/*.cpp" "${_tests}/common/*.cpp")
file(GLOB KVFERRY_TCP_TESTS CONFIGURE_DEPENDS "${_tests}/tcp/*.cpp" "${_tests}/common/*.cpp")
file(GLOB KVFERRY_AUTO_TESTS CONFIGURE_DEPENDS "${_tests}/auto/*.cpp")
file(GLOB KVFERRY_SHM_TESTS CONFIGURE_DEPENDS "${_tests}/shm/*.cpp")
# What concerns the whole process; starts itself anew for what changes that.
file(GLOB KVFERRY_PROCESS_TESTS CONFIGURE_DEPENDS "${_tests}/process/*.cpp")
# Strangers that attack a channel.
file(GLOB KVFERRY_HOSTILE_TESTS CONFIGURE_DEPENDS "${_tests}/hostile/*.cpp")
# Honest peers, many of them.
file(GLOB KVFERRY_LOAD_TESTS CONFIGURE_DEPENDS "${_tests}/load/*.cpp")
# With threads, a clock and sockets of the tests' own, under the library's objects; and without ZeroMQ.
file(GLOB KVFERRY_SCHEDULE_TESTS CONFIGURE_DEPENDS "${_tests}/schedules/*.cpp")
# Those that need a device are programs of their own.
file(GLOB KVFERRY_RDMA_TESTS CONFIGURE_DEPENDS "${_tests}/rdma/*.cpp")
file(GLOB KVFERRY_RDMA_DEVICE_TESTS CONFIGURE_DEPENDS "${_tests}/rdma/device/*.cpp")
file(GLOB KVFERRY_RDMA_PEER_PAIR_TESTS CONFIGURE_DEPENDS "${_tests}/rdma/peer_pair/*.cpp" "${_tests}/examples/peer_process.cpp")
file(GLOB KVFERRY_RDMA_ENVIRONMENT_TESTS CONFIGURE_DEPENDS "${_tests}/rdma/environment/*.cpp")
file(GLOB KVFERRY_RDMA_TWO_HOSTS_TESTS CONFIGURE_DEPENDS "${_tests}/rdma/two_hosts/*.cpp")
file(GLOB KVFERRY_MODEL_TESTS CONFIGURE_DEPENDS "${_tests}/model/*.cpp")
set(KVFERRY_RDMA_MODEL_TESTS ${KVFERRY_MODEL_TESTS})
list(FILTER KVFERRY_MODEL_TESTS EXCLUDE REGEX "/rdma_[^/]*$")
list(FILTER KVFERRY_RDMA_MODEL_TESTS EXCLUDE REGEX "/tcp_[^/]*$")
file(GLOB KVFERRY_CONFORMANCE_TESTS CONFIGURE_DEPENDS "${_tests}/conformance/*.cpp")
list(FILTER KVFERRY_CONFORMANCE_TESTS EXCLUDE REGEX "/(broken_channel_main|rdma_[a-z_]+)\\.cpp$")
file(GLOB KVFERRY_RDMA_CONFORMANCE_TESTS CONFIGURE_DEPENDS "${_tests}/conformance/rdma_*.cpp")
set(KVFERRY_BROKEN_CHANNEL "${_tests}/conformance/broken_channel_main.cpp")
file(GLOB KVFERRY_EXAMPLES_TESTS CONFIGURE_DEPENDS "${_tests}/examples/*.cpp")

unset(_include)
unset(_src)
unset(_tests)
