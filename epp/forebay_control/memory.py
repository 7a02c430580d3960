"""How a server process keeps its memory. What the memory holds is decided elsewhere."""

from __future__ import annotations

import ctypes
import gc

# From glibc's malloc.h; see mallopt(3).
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MMAP_THRESHOLD_BYTES = 128 * 1024
_MAX_ARENAS = 1
_YOUNGEST_OBJECTS = 10_000  # at most so many lie about between two collections


def limit_fragmentation() -> None:
    """Keep buffers of 128 KiB and more out of the heap: their memory goes back when they are freed.

    By default glibc raises its mmap threshold to the largest buffer that was ever freed, up to
    32 MiB: from then on larger bodies, too, lie in the heap between small objects, in one arena for
    each of grpc's threads. A value that is set stays. Does nothing where the C library is not
    glibc. Call it before the first thread starts.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_ARENA_MAX, _MAX_ARENAS)


def make_collections_rare() -> None:
    """Leave what exists now to the end of the process, and look for garbage seldom.

    The objects of a stream die by reference count. Those of a scrape that failed do not: a
    traceback, its frames and the exception refer to each other, some 60 objects each time. The
    youngest generation is therefore as small as what a few seconds of a dead server leave.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNGEST_OBJECTS, 100, 100)
