# SPDX-License-Identifier: Apache-2.0
"""Conan recipe of kvferry: `conan create packaging/conan`. packaging/try_conan.sh tries it."""

import re
from pathlib import Path

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.cmake import CMake, CMakeDeps, CMakeToolchain, cmake_layout
from conan.tools.files import copy, load


class Kvferry(ConanFile):
    name = "kvferry"
    description = "Moves KV-cache pages between inference servers"
    license = "Apache-2.0"
    topics = ("kv-cache", "rdma", "tcp", "inference")
    package_type = "library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"shared": [True, False], "with_rdma": [True, False]}
    # RDMA takes the system's libibverbs, which Conan has no package of.
    default_options = {"shared": False, "with_rdma": False}

    def _root(self):
        return Path(self.recipe_folder).parent.parent

    def set_version(self):
        project = load(self, self._root() / "CMakeLists.txt")
        self.version = re.search(r"VERSION (\d+\.\d+\.\d+)", project).group(1)

    def export_sources(self):
        for what in ("CMakeLists.txt", "LICENSE", "cmake/*", "docs/*", "include/*", "src/*", "tools/*"):
            copy(self, what, src=self._root(), dst=self.export_sources_folder)

    def validate(self):
        check_min_cppstd(self, 20)

    def layout(self):
        cmake_layout(self)

    def requirements(self):
        for header in ("asio/[>=1.22 <2]", "msgpack-cxx/[>=4.1 <8]"):
            self.requires(header, transitive_headers=True)
        # Those of the header-only targets, too.
        self.requires("cppzmq/[>=4.8 <5]", transitive_headers=True)
        self.requires("zeromq/[>=4.3 <5]", transitive_headers=True, transitive_libs=True)
        self.requires("xxhash/[>=0.8 <1]", transitive_headers=True)
        self.requires("openssl/[>=3 <4]", transitive_headers=True, transitive_libs=True)

    def generate(self):
        CMakeDeps(self).generate()
        toolchain = CMakeToolchain(self)
        toolchain.cache_variables["KVFERRY_WITH_TLS"] = "ON"
        toolchain.cache_variables["KVFERRY_WITH_RDMA"] = "ON" if self.options.with_rdma else "OFF"
        for left_out in ("TESTS", "EXAMPLES", "BENCHMARKS"):
            toolchain.cache_variables[f"KVFERRY_BUILD_{left_out}"] = False
        toolchain.cache_variables["KVFERRY_UNITY_BUILD"] = True
        toolchain.cache_variables["KVFERRY_WARNINGS_AS_ERRORS"] = False
        toolchain.generate()

    def build(self):
        cmake = CMake(self)
        cmake.configure()
        cmake.build()

    def package(self):
        copy(self, "LICENSE", src=self.source_folder, dst=Path(self.package_folder) / "licenses")
        CMake(self).install()

    def package_info(self):
        # The CMake package that kvferry installs itself has all targets.
        self.cpp_info.set_property("cmake_find_mode", "none")
        self.cpp_info.builddirs = [str(Path("lib") / "cmake" / "kvferry")]
