"""What becomes of the memory of tensors on the CPU that are freed."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the next tensors, in place of giving it back to the system.

    By default glibc takes every large block anew from the system, which clears its pages one by one: about a tenth of the
    seconds of an iteration of GPT-2. From now on the process stays as large as it was at its peak, as on a GPU under
    torch's allocator. Nothing happens where the C library is not glibc, or the environment says what it is to do
    (``MALLOC_...``, ``GLIBC_TUNABLES``).
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not chosen else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
