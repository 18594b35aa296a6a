"""Checksums of files that are hashed while they are read: any order, any pieces, any threads; what counts is what was read."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash

from codefuse_triton import _native
from codefuse_triton._native import LoadError
from codefuse_triton._native.testing import Verification as _Verification

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from weights_writer import Planned, write_weights  # noqa: E402

BLOCK = 1024
NOTED = 64 * BLOCK  # a read of less is left for later
GAP = 256 * BLOCK   # of blocks that are not waited for


@pytest.fixture
def weights(tmp_path):
    """Two files of tensors, the first of some MB; sizes that are no multiple of a block."""
    rng = np.random.default_rng(0)
    shapes = {"a": (900, 1111), "b": (5,), "c": (2000, 1003), "d": (777,)}
    values = {n: rng.integers(0, 256, s, np.uint8) for n, s in shapes.items()}
    write_weights(tmp_path, {}, [Planned(n, v.shape, v.dtype, lambda v=v: v) for n, v in values.items()], [])
    path, = tmp_path.glob("*.safetensors")
    small = tmp_path / "z.safetensors"
    small.write_bytes((8).to_bytes(8, "little") + b"{}      ")
    config = json.loads((tmp_path / "config.json").read_text())
    config["files"].append({"name": small.name, "bytes": 16, "xxh3_64": f"{xxhash.xxh3_64_intdigest(small.read_bytes()):016x}"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return path


def Verification(directory, threads, **options):
    return _Verification(str(directory), threads, **options)


def damage(path, at):
    """One bit, in the file that is mapped: not in a copy of it."""
    with open(path, "r+b") as f:
        byte = os.pread(f.fileno(), 1, at)[0]
        os.pwrite(f.fileno(), bytes([byte ^ 4]), at)


def pieces(size, rng, largest):
    """The file in pieces of any length from any byte, in any order."""
    cuts = [0]
    while cuts[-1] < size:
        cuts.append(min(size, cuts[-1] + int(rng.integers(1, largest))))
    return [(a, b - a) for a, b in np.array(list(zip(cuts, cuts[1:])))[rng.permutation(len(cuts) - 1)].tolist()]


@pytest.mark.parametrize("kernels", _native.testing.hash_kernels())
def test_every_processor_hashes_alike(kernels):
    data = np.random.default_rng(1).integers(0, 256, 70_000, dtype=np.uint8).tobytes()
    for size in (0, 16, 240, 241, 1024, 1025, 16 * 1024, 17 * 1024 + 1, 65_536, 70_000):
        assert _native.testing.xxh3_64(kernels, data[:size]) == xxhash.xxh3_64_intdigest(data[:size]), size


@pytest.mark.parametrize("seed", range(12))
def test_any_pieces_in_any_order(weights, seed):
    rng = np.random.default_rng(seed)
    raw = weights.read_bytes()
    v = Verification(weights.parent, 2)
    reads = pieces(len(raw), rng, [NOTED, 2 * NOTED, 10 * NOTED, len(raw)][seed % 4])
    if seed % 3 == 1:
        reads = reads[: len(reads) // 2]  # the others are read by wait()
    if seed % 3 == 2:
        reads += pieces(len(raw), rng, 5 * NOTED)  # some bytes twice
    with ThreadPoolExecutor(4) as pool:
        for (begin, size), found in zip(reads, pool.map(lambda r: v.read(0, *r), reads)):
            assert found == raw[begin:begin + size]
    v.wait()


@pytest.mark.parametrize("seed", range(4))
def test_what_was_read_is_what_counts(weights, seed):
    """A bit that is wrong on the way is found although the file is sound later, and one that goes wrong in the file later is not looked for."""
    rng = np.random.default_rng(seed)
    size = weights.stat().st_size
    reads = sorted(pieces(size, rng, 8 * NOTED), reverse=seed % 2 == 1)
    begin = next(b for b, n in reads if n > 2 * NOTED)
    v = Verification(weights.parent, 2)
    for r in reads:
        damage(weights, begin + NOTED) if r[0] == begin else None
        v.read(0, *r)
        damage(weights, begin + NOTED) if r[0] == begin else None
    with pytest.raises(LoadError, match="what was read of it is not what it holds: its checksum is [0-9a-f]{16}; expected [0-9a-f]{16}"):
        v.wait()
    v = Verification(weights.parent, 2)
    for r in reads:
        v.read(0, *r)
    damage(weights, begin + NOTED)
    v.wait()


@pytest.mark.parametrize("left", [1, GAP // 2, 3 * GAP])
def test_what_was_not_read_is_checked_too(weights, left):
    """left: bytes at a tensor's beginning that nobody reads, fewer and more than what a later read makes up for."""
    raw = weights.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    at = 8 + n + json.loads(raw[8:8 + n])["c"]["data_offsets"][0]
    damage(weights, at)
    v = Verification(weights.parent, 2)
    v.read(0, 0, at)
    v.read(0, at + left, len(raw) - at - left)
    with pytest.raises(LoadError, match=f"{weights.name}: tensor c is damaged: its checksum is"):
        v.wait()
    damage(weights, at)
    Verification(weights.parent, 2).wait()


def test_a_file_that_became_shorter(weights):
    size = weights.stat().st_size
    v = Verification(weights.parent, 2)
    os.truncate(weights, size // 2)
    with pytest.raises(LoadError, match=rf"{weights.name}: cannot be read at byte {size // 2}: it ends there; it has become shorter"):
        v.read(0, size // 4, size // 2)


@pytest.mark.parametrize("ahead_bytes, kept", [(0, False), (64 << 20, True)])
def test_sums_that_wait_are_bounded(weights, ahead_bytes, kept):
    """A file that is read from its end: what is not kept is read again, and then shows a bit that has gone wrong since."""
    size = weights.stat().st_size
    v = Verification(weights.parent, 2, ahead_bytes=ahead_bytes)
    for begin in range(size // NOTED * NOTED, -1, -NOTED):
        v.read(0, begin, min(NOTED, size - begin))
    v.read(1, 0, 16)
    damage(weights, size // 2)
    if kept:
        v.wait()
    else:
        with pytest.raises(LoadError, match="tensor c is damaged"):
            v.wait()
