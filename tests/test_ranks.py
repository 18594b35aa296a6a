"""The exchanges between the ranks of a tensor-parallel model, each rank adding in rank order: numpy's bits on every rank, every time."""

import time

import numpy as np
import pytest
from codefuse_triton import DeviceError, devices
from codefuse_triton._native import testing

GPUS = sum(name.startswith("cuda") for name in devices()[0])


def on_gpus(world: int):
    return pytest.param("cuda", world, id=f"cuda-{world}", marks=[
        pytest.mark.gpu, pytest.mark.skipif(GPUS < world, reason=f"{GPUS} GPUs {devices()[1]}")])


ON = pytest.mark.parametrize("device, world", [("cpu", 2), ("cpu", 3), on_gpus(2), on_gpus(3), on_gpus(4), on_gpus(8)])
SMALL, LARGE = 1 << 16, 1 << 20  # floats up to which one exchange, or one launch of the other kind, is enough (native/cuda/comm.h)


def share(total: int, rank: int, world: int) -> slice:
    return slice(total * rank // world, total * (rank + 1) // world)


def check_sums(ranks: testing.Ranks, rng: np.random.Generator, world: int, k: int, n: int) -> None:
    y = np.repeat(rng.standard_normal((1, n), np.float32), world, 0)
    data = rng.standard_normal((world, k, n), np.float32) * np.float32(2) ** rng.integers(-8, 8, (world, k, 1)).astype(np.float32)
    want = y[0].copy()
    for i in range(k):
        total = np.zeros(n, np.float32)
        for r in range(world):
            total += data[r, i]
        want += total
    got, left = ranks.add_sums(y, data)
    for r in range(world):
        np.testing.assert_array_equal(got[r].view(np.uint32), want.view(np.uint32), err_msg=f"rank {r}")
    assert not left.any()


@ON
def test_sums(device, world):
    ranks, rng = testing.Ranks(device, world), np.random.default_rng(0)
    sizes = [1, 2, 3, 7, 257, 5120, SMALL - 1, SMALL, SMALL + 1, SMALL + 5, 131 * 1001, LARGE - 3, LARGE, LARGE + 1, 2 * LARGE + 12345]
    for n in sizes + sizes[::-1]:
        check_sums(ranks, rng, world, 1 if device == "cpu" else 3, n)


@ON
def test_many_sums_one_behind_the_other(device, world):
    ranks, rng = testing.Ranks(device, world), np.random.default_rng(1)
    for n, k in [(5120, 1000), (37, 1000), (3 * 5120, 300), (SMALL + 4, 100), (5120, 1000)]:
        check_sums(ranks, rng, world, k // (50 if device == "cpu" else 1), n)


@ON
def test_columns(device, world):
    ranks, rng = testing.Ranks(device, world), np.random.default_rng(2)
    for rows, total in [(1, world), (1, 131), (3, 131), (1, 100831), (64, 100831 if device == "cuda" else 4099), (5, 4096), (2, LARGE + 3)]:
        k = 1 if rows * total > LARGE else 20
        whole = rng.standard_normal((k, rows, total), np.float32)
        got = ranks.gather_columns([whole[:, :, share(total, r, world)] for r in range(world)], total)
        for r in range(world):
            np.testing.assert_array_equal(got[r], whole, err_msg=f"rank {r} {rows} x {total}")


@ON
@pytest.mark.parametrize("n", [5120, SMALL + 4])
def test_a_rank_that_does_not_come_leaves_nobody_waiting(device, world, n):
    ranks, start = testing.Ranks(device, world), time.monotonic()
    with pytest.raises(DeviceError, match="another rank of the model failed"):
        ranks.add_sums(np.zeros((world, n), np.float32), np.ones((world, 2, n), np.float32), absent=world - 1)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("world", [-1, 0, 1])
def test_one_rank_has_nobody_to_exchange_with(world):
    with pytest.raises(ValueError, match=f"world is {world}; expected 2 or more"):
        testing.Ranks("cpu", world)


@pytest.mark.gpu
@pytest.mark.skipif(GPUS == 0, reason=f"no CUDA device: {devices()[1]}")
def test_more_ranks_than_gpus():
    with pytest.raises(ValueError, match=f"tensor_parallel is {GPUS + 1}, one GPU each; from cuda:0 there"):
        testing.Ranks("cuda", GPUS + 1)
    with pytest.raises(ValueError, match=f"tensor_parallel is 2, one GPU each; from cuda:{GPUS - 1} there is 1"):
        testing.Ranks(f"cuda:{GPUS - 1}", 2)
