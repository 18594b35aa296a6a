"""A weight that the compute dtype cannot hold is named: file, tensor, place, value and limit."""
import contextlib
import shutil

import numpy as np
import pytest

from codefuse_triton._native import LoadError, testing

pytest.importorskip("torch")
from helpers import make_neox, runner  # noqa: E402
from test_cuda import pytestmark as gpu  # noqa: E402
from test_weights import parts, set_config  # noqa: E402

import quantize  # noqa: E402

NAME = "layers.1.mlp_up.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By format; the matrices have rows of 128 columns or more."""
    path = tmp_path_factory.mktemp("models")
    plain = make_neox(path, hidden_size=128, intermediate_size=256, num_attention_heads=4)[1]
    for format in ("q8_row", "q4_g64"):
        quantize.quantize(plain, path / format, format, progress=contextlib.nullcontext(lambda n: None))
    return {"f32": plain} | {format: path / format for format in ("q8_row", "q4_g64")}


@pytest.fixture
def put(models, tmp_path):
    """put(format, tensor, element, value) -> a model with that value there, without checksums."""
    def make(format, tensor, at, value):
        directory = tmp_path / f"{format}-{value}"
        shutil.copytree(models[format], directory)
        path, header, data = parts(directory)
        begin, end = header[tensor]["data_offsets"]
        dtype = {"F32": np.float32, "F16": np.float16}[header[tensor]["dtype"]]
        values = np.frombuffer(data[begin:end], dtype).copy()
        values[at] = value
        raw = path.read_bytes()
        path.write_bytes(raw[:len(raw) - len(data)] + data[:begin] + values.tobytes() + data[end:])
        set_config(directory, files=None)
        return directory
    return make


REFUSED = [
    ("f32", NAME, 3 * 128 + 5, 70000, "float16", f"tensor {NAME} has 70000 at [3, 5]; float16 holds at most 65504: use bfloat16 or float32"),
    ("f32", NAME, 0, -65520, "float16", f"tensor {NAME} has -65520 at [0, 0]; float16 holds at most 65504"),
    ("f32", "embed.weight", 128, 3.4e38, "bfloat16", "tensor embed.weight has 3.4e+38 at [1, 0]; bfloat16 holds at most 3.38953e+38: use float32"),
    ("q8_row", "layers.0.qkv.scale", 9, 600, "float16", "tensor layers.0.qkv.scale has 600 at [9], so a weight may be 76200; float16 holds at most 65504"),
    ("q4_g64", "layers.0.qkv.scale", 5, 5000, "float16", "tensor layers.0.qkv.scale has 5000 at [2, 1], so a weight may be 75000; float16 holds at most 65504")]


@pytest.mark.parametrize("format, tensor, at, value, dtype, message", REFUSED)
def test_what_does_not_fit_is_named(put, format, tensor, at, value, dtype, message):
    directory = put(format, tensor, at, value)
    with pytest.raises(LoadError) as error:
        testing.check_fits(str(directory), dtype)
    file, = directory.glob("*.safetensors")
    assert str(error.value).startswith(f"{file}: {message}")


@pytest.mark.parametrize("format, tensor, value, dtype", [
    ("f32", NAME, 65519, "float16"), ("f32", NAME, np.inf, "float16"), ("f32", NAME, 70000, "bfloat16"), ("f32", NAME, 3.4e38, "float32"),
    ("f32", "layers.0.norm1.weight", 70000, "float16"), ("q8_row", "layers.0.qkv.scale", 600, "bfloat16"), ("q4_g64", "layers.0.qkv.scale", 4364, "float16")])
def test_what_fits(put, format, tensor, value, dtype):
    testing.check_fits(str(put(format, tensor, 0, value)), dtype)


@gpu[0]
@gpu[1]
@pytest.mark.parametrize("format, tensor, at, value, dtype, message", REFUSED)
def test_a_device_that_finds_it(put, format, tensor, at, value, dtype, message):
    with pytest.raises(LoadError) as error:
        runner(put(format, tensor, at, value), device="cuda:0", dtype=dtype)
    assert message in str(error.value)
