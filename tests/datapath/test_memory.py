"""What the C library keeps: payloads that come again take no new pages of the kernel."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: the setting is of the whole process.
PROGRAM = """
import resource, sys
from nbdfleece.datapath.memory import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit(3)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    four = [bytearray(1 << 20) for _ in range(4)]
    del four
before = faults()
for _ in range(50):
    four = [bytearray(1 << 20) for _ in range(4)]
    del four
print(faults() - before)
"""


def test_payloads_that_come_again_take_no_new_pages() -> None:
    command = [sys.executable, "-c", PROGRAM, "kept"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:  # a C library without the setting
        return
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2000  # of 50000 pages
