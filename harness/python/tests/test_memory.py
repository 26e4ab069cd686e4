"""What a call takes beside its arguments and its result."""

import subprocess
import sys

import pytest

MIB = 2**20
SCRIPT = """
import sys
import gearbox, numpy

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

def growth(call, *arguments):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    return call(*arguments), status("VmHWM") - before

# Ones, so that pages are there before; a chunk is 256 KiB.
array = numpy.ones((32768, 8, 128), numpy.float16)
pipeline = gearbox.Pipeline({"routes": [{"codec": {"id": "lz4"}}], "chunking": {"mode": "chunked", "tokens": 128}})
gearbox.decode(gearbox.encode((array[:1024], array[:1024]), pipeline))
stored, encode = growth(gearbox.encode, (array, array), pipeline)
pair, decode = growth(gearbox.decode, stored)
assert all((got == 1).all() for got in pair)
print(2 * array.nbytes, len(stored), encode, decode)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_arrays_are_copied_neither_in_nor_out():
    told = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, timeout=120).stdout
    tensors, stored, encode, decode = map(int, told.split())
    assert tensors == 128 * MIB and stored < 4 * MIB
    # Chunks in flight and what they become, but no tensor: the pair is 128 MiB, each array 64 MiB.
    assert encode < 48 * MIB, f"{encode / MIB:.1f} MiB"
    # The arrays that come back, and no second copy of one.
    assert decode < tensors + 48 * MIB, f"{decode / MIB:.1f} MiB"
