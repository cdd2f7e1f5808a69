"""Large pages of memory for what XLA computes on a CPU."""

from __future__ import annotations

import os
import platform
import sys

VARIABLE, LARGE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Starts this process anew, with the same arguments and number, so that the C library asks Linux for pages of 2 MiB.

    XLA's CPU backend takes its temporaries from `malloc` at every call, and gives them back: gigabytes of fresh pages of 4 KiB a training step, each of which the kernel
    has to clear and map (docs/performance.md has the figures). The library reads the variable `GLIBC_TUNABLES` when a process starts, and never again; where it is set
    already, to nothing too, and where there is no glibc, nothing is done.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" and VARIABLE not in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, VARIABLE: LARGE})
