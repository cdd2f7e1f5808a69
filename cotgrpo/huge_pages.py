"""Huge pages of memory for what XLA computes on a CPU."""

from __future__ import annotations

import os
import platform
import sys

VARIABLE, TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Restart this process, with the same arguments and process id, so that `malloc` asks Linux for pages of 2 MiB.

    XLA's CPU backend allocates its temporaries at each call and frees them. With pages of 4 KiB, the kernel clears and
    maps gigabytes of them in each train step. benchmarks/NOTES.md has the figures. The variable `GLIBC_TUNABLES` is
    read only when a process starts. Without glibc, or if the variable is set (even to an empty value), this does
    nothing.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc" and VARIABLE not in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, VARIABLE: TUNABLE})
