# SPDX-License-Identifier: Apache-2.0
# cmake -DBUILD_DIR=<dir> -DPREFIX=<dir> -P install.cmake: installs afresh, so that no file of an earlier install helps.
file(REMOVE_RECURSE "${PREFIX}")
execute_process(COMMAND "${CMAKE_COMMAND}" --install "${BUILD_DIR}" --prefix "${PREFIX}" COMMAND_ERROR_IS_FATAL ANY)
