# SPDX-License-Identifier: Apache-2.0
"""python -m kvferry.lmcache MODULE ARGUMENT...: runs a module that finds kvferry's channels in LMCache."""

import runpy
import sys

import kvferry.lmcache  # noqa: F401

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("python -m kvferry.lmcache MODULE ARGUMENT...")
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
