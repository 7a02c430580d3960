"""How the EPP and the operator keep their memory."""

import subprocess
import sys

# In a process of its own, because the allocator's thresholds hold for a whole process. hblks counts
# the blocks that are mapped on their own.
SCRIPT = """
import ctypes
from forebay_control import memory

class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2
memory.limit_fragmentation()
bytearray(8_000_000)
before = libc.mallinfo2().hblks
body = bytearray(200_000)
print(libc.mallinfo2().hblks - before)
"""


# Each turn leaves two lists that refer to each other.
GARBAGE = """
import gc
from forebay_control import memory

memory.make_collections_rare()
most = 0
for _ in range(50_000):
    one, other = [], []
    one.append(other)
    other.append(one)
    most = max(most, gc.get_count()[0])
print(most)
"""


def printed_by(script: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


def test_body_after_a_larger_one_stays_out_of_the_heap() -> None:
    """A body after a larger one is mapped on its own, so that its memory goes back when it ends."""
    assert printed_by(SCRIPT) == "1"


def test_garbage_that_holds_itself_is_bounded() -> None:
    """Exceptions of failed scrapes keep their frames alive until a collection."""
    assert int(printed_by(GARBAGE)) <= 10_001
