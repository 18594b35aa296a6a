"""Loading: what is wrong with a weights directory is said by file, tensor or key, what was found and what was expected."""

import json
import shutil
import struct

import numpy as np
import pytest
import xxhash

from codefuse_triton import Engine, _native
from codefuse_triton._native import LoadError

pytest.importorskip("torch")
from helpers import make_neox, runner  # noqa: E402


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_neox(tmp_path_factory.mktemp("good"))[1]


@pytest.fixture
def whole(good, tmp_path):
    shutil.copytree(good, tmp_path / "w")
    return tmp_path / "w"


@pytest.fixture
def copy(whole):
    """Without sizes and checksums, which would show every change made here."""
    set_config(whole, files=None)
    return whole


def set_config(directory, **changes):
    """None takes a key away."""
    config = {**json.loads((directory / "config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def parts(directory):
    """Path, header and data of the directory's one file."""
    path, = directory.glob("*.safetensors")
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    return path, json.loads(raw[8:8 + n]), raw[8 + n:]


def rewrite(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refused(directory, message, **options):
    with pytest.raises(LoadError, match=message):
        runner(directory, **options)


def test_directory_and_files(copy, tmp_path):
    refused(tmp_path / "nowhere", "nowhere/config.json: cannot be opened: No such file")
    path, header, data = parts(copy)
    path.rename(copy / "weights.bin")
    refused(copy, r"expected \*.safetensors files, found none")
    path.mkdir()
    refused(copy, "not a regular file")


@pytest.mark.parametrize("size", [0, 7])
def test_too_short_for_a_header(copy, size):
    path, _, _ = parts(copy)
    path.write_bytes(b"x" * size)
    refused(copy, f"expected a safetensors file, found {size} bytes")


def test_headers(copy):
    path, header, data = parts(copy)
    raw = path.read_bytes()
    for claimed in (len(raw), 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", claimed) + raw[8:])
        refused(copy, f"header should take {claimed} bytes, but the file has {len(raw)}; truncated or not")
    path.write_bytes(raw[:8] + b"[" + raw[9:])
    refused(copy, "not valid JSON at byte")
    rewrite(path, [1], data)
    refused(copy, "expected a JSON object as header, found an array")


def test_truncated_anywhere(copy):
    path, _, _ = parts(copy)
    raw = path.read_bytes()
    for size in {len(raw) - 1, len(raw) // 2, len(raw) // 3, 9, 100}:
        path.write_bytes(raw[:size])
        refused(copy, "truncated")


@pytest.mark.parametrize("change,message", [
    (dict(dtype="I64"), "tensor layers.1.qkv.weight: dtype is I64; expected F32, F16, BF16, I8 or U8"),
    (dict(dtype="I8", shape=[288, 384]), r"layers.1.qkv.weight has shape \[288, 384\]; expected \[288, 96\]"),
    (dict(shape=[96, 288]), r"layers.1.qkv.weight has shape \[96, 288\]; expected \[288, 96\]"),
    (dict(shape=[288, 95]), "tensor layers.1.qkv.weight: shape .* takes 109440 bytes; its data_offsets span 110592"),
    (dict(shape=[-288, -96]), "tensor layers.1.qkv.weight: a dimension is -288"),
    (dict(shape=[2**40, 2**40]), "tensor layers.1.qkv.weight: its shape is too large"),
    (dict(shape="x"), "tensor layers.1.qkv.weight: expected dtype, shape and two data_offsets"),
    (dict(data_offsets=[10, 5]), "tensor layers.1.qkv.weight: data_offsets are 10 and 5"),
    (dict(data_offsets=[1 << 40, (1 << 40) + 110592]), "ends at byte .* of the data, but the file has .* truncated"),
    (dict(data_offsets=[0.5, 5]), "data_offsets are 0.5 and 5"),
])
def test_tensor_entries(copy, change, message):
    path, header, data = parts(copy)
    header["layers.1.qkv.weight"].update(change)
    rewrite(path, header, data)
    refused(copy, message)


def test_overlap_missing_unknown_and_repeated_tensors(copy):
    path, header, data = parts(copy)
    other = dict(header)
    begin, end = header["layers.0.qkv.weight"]["data_offsets"]
    other["layers.1.qkv.weight"] = {**header["layers.1.qkv.weight"], "data_offsets": [begin + 4, end + 4]}
    rewrite(path, other, data)
    refused(copy, "tensor layers.1.qkv.weight overlaps tensor layers.0.qkv.weight|overlaps tensor layers.1.qkv.weight")
    rewrite(path, {k: v for k, v in header.items() if k != "layers.0.mlp_down.weight"}, data)
    refused(copy, r"tensor layers.0.mlp_down.weight is missing; expected shape \[96, 152\]")
    rewrite(path, {k: v for k, v in header.items() if k != "final_norm.weight"}, data)
    refused(copy, r"tensor final_norm.weight is missing; expected shape \[96\]")
    rewrite(path, {**header, "layers.7.qkv.bias": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, data)
    refused(copy, "tensor layers.7.qkv.bias has no place in the model of config.json")
    rewrite(path, header, data)
    shutil.copy(path, copy / "more.safetensors")
    refused(copy, "tensor .* also in")


@pytest.mark.parametrize("change,message", [
    (dict(format_version=2), "format_version is 2; expected an integer from 1 to 1"),
    (dict(hidden=0), "hidden is 0; expected an integer from 1"),
    (dict(hidden=96.5), "hidden is 96.5; expected an integer"),
    (dict(layers="2"), 'layers is "2"; expected an integer from 1'),
    (dict(heads=None), "heads is null"),
    (dict(kv_heads=3), "kv_heads is 3; expected a divisor of heads, 4"),
    (dict(kv_heads=5), "kv_heads is 5; expected an integer from 1 to 4"),
    (dict(rope_dim=5), "rope_dim is 5; expected an even number up to head_dim, 24"),
    (dict(rope_dim=26), "rope_dim is 26; expected an integer from 0 to 24"),
    (dict(rope_theta=0), "rope_theta is 0; expected a number above 0"),
    (dict(rope_scaling={"type": "yarn"}), 'rope_scaling: type is "yarn"; expected "none" or "linear"'),
    (dict(rope_scaling={"type": "linear"}), "rope_scaling: factor is missing"),
    (dict(rope_scaling="none"), "rope_scaling: expected a JSON object"),
    (dict(norm="group"), 'norm is "group"; expected "layer" or "rms"'),
    (dict(norm_eps=-1), "norm_eps is -1; expected a number above 0"),
    (dict(activation="swish"), 'activation is "swish"; expected "gelu" or "gelu_tanh" or "relu" or "silu"'),
    (dict(residual=1), 'residual is 1; expected "serial" or'),
    (dict(gated="no"), 'gated is "no"; expected true or false'),
    (dict(position="alibi"), 'position is "alibi"; expected "rope" or "learned"'),
    (dict(tied=1), "tied is 1; expected true or false"),
    (dict(eos_ids=[131]), "eos_ids is an array with 131; expected token ids from 0 to 130"),
    (dict(eos_ids=2), "eos_ids is 2; expected an array of token ids"),
    (dict(bos_id=131), "bos_id is 131; expected an integer from -1 to 130"),
    (dict(vocab=10**12), "vocab is 1000000000000; expected an integer from 1"),
    (dict(tied=True), "tensor lm_head.weight has no place"),
    (dict(gated=True), "tensor layers.0.mlp_gate.weight is missing"),
    (dict(layers=3), "tensor layers.2.norm1.weight is missing"),
])
def test_config(copy, change, message):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    refused(copy, message)


@pytest.mark.parametrize("key", ["format_version", "vocab", "hidden", "norm", "eos_ids", "tied", "rope_scaling", "architecture"])
def test_config_without_a_key(copy, key):
    config = json.loads((copy / "config.json").read_text())
    del config[key]
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, f"config.json: {key} is missing; expected")


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "[1, 2", '{"a": tru}', '{"a": 1} x', '{"a": 1, "a": 2}', '{"a": 01x}', '{"a": "\x01"}',
                                  '{"a": "\\q"}', '{"a": "\\u12"}', "[" * 100 + "]" * 100, '{"a": 1e999}', '{"a"', '{"a": "'])
def test_config_that_is_not_json(copy, text):
    (copy / "config.json").write_text(text)
    refused(copy, "config.json: not valid JSON at byte")


def damage(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


def data_at(path, tensor):
    """First byte of a tensor in its file."""
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    return 8 + n + json.loads(raw[8:8 + n])[tensor]["data_offsets"][0]


def test_checksums_are_xxh3():
    """Every length up to some blocks of the hash, and where its ways of hashing begin and end."""
    data = np.random.default_rng(0).integers(0, 256, 70_000, dtype=np.uint8)
    for size in (*range(2200), 4095, 4096, 4097, 65_536, 65_537, 70_000):
        assert _native.xxh3_64(data[:size]) == xxhash.xxh3_64_intdigest(data[:size].tobytes()), size
    assert _native.xxh3_64(data[3:1500].view(np.uint8)) == xxhash.xxh3_64_intdigest(data[3:1500].tobytes())
    with pytest.raises(ValueError, match="contiguous"):
        _native.xxh3_64(data[::2])


def test_a_damaged_tensor_is_named(whole):
    path, _, _ = parts(whole)
    runner(whole)
    hashes = json.loads((whole / "config.json").read_text())["files"][0]["tensors"]
    for tensor in ("embed.weight", "layers.1.norm2.bias", "lm_head.weight"):
        at = data_at(path, tensor) + 7
        damage(path, at)
        refused(whole, rf"{path.name}: tensor {tensor} is damaged: its checksum is [0-9a-f]{{16}}; expected {hashes[tensor]}")
        refused(whole, f"tensor {tensor} is damaged", tensor_parallel=2)
        damage(path, at)
    runner(whole)


def test_damage_is_what_is_named_even_if_it_shows_elsewhere(whole):
    path, _, _ = parts(whole)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"layers.1.qkv.weight", b"layers.1.qkw.weight"))
    refused(whole, f"{path.name}: its header is damaged: the file's checksum is [0-9a-f]{{16}}; expected")
    config = json.loads((whole / "config.json").read_text())
    del config["files"][0]["tensors"]  # as written by earlier versions
    (whole / "config.json").write_text(json.dumps(config))
    refused(whole, f"{path.name}: damaged: the file's checksum is")
    path.write_bytes(raw)
    runner(whole)


def test_files_are_those_of_the_config(whole):
    path, header, data = parts(whole)
    size = path.stat().st_size
    with open(path, "ab") as f:
        f.write(b"x")
    refused(whole, f"{path.name}: has {size + 1} bytes; expected {size} as in config.json$")
    header["more.weight"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path.write_bytes(path.read_bytes()[:size])
    rewrite(whole / "more.safetensors", {"more.weight": header["more.weight"]}, b"")
    refused(whole, "more.safetensors: not one of the files of config.json")
    (whole / "more.safetensors").unlink()
    runner(whole)
    path.rename(whole / "other.safetensors")
    refused(whole, f"{path.name}: missing; config.json lists it with {size} bytes")


@pytest.mark.parametrize("files, message", [
    ("all", r'files is "all"; expected an array'), ([7], r"files\[0\] is 7; expected an object"), ([{}], r"files\[0\].name is missing"),
    ([{"name": "a", "bytes": -1}], r"files\[0\].bytes is -1; expected an integer, 0 or more"),
    ([{"name": "a", "bytes": 1, "xxh3_64": "12"}], r'files\[0\].xxh3_64 is "12"; expected 16 hexadecimal digits'),
    ([{"name": "a", "bytes": 1, "xxh3_64": "0" * 16, "tensors": {"t": 5}}], r"files\[0\].tensors.t is 5; expected 16 hexadecimal digits"),
])
def test_bad_records_of_files(copy, files, message):
    set_config(copy, files=files)
    refused(copy, message)


def test_files_of_another_version_or_architecture(copy):
    path, header, data = parts(copy)
    rewrite(path, {**header, "__metadata__": {**header["__metadata__"], "version": "7"}}, data)
    refused(copy, f'{path.name}: version is "7" in its metadata; expected "1"')
    rewrite(path, {**header, "__metadata__": {**header["__metadata__"], "architecture": "llama"}}, data)
    refused(copy, f'{path.name}: architecture is "llama" in its metadata; expected "gpt_neox" as in config.json')
    rewrite(path, header, data)
    runner(copy)
    (copy / "config.json").write_text(json.dumps({"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}))
    refused(copy, "config.json: has architectures, so it is a Hugging Face config; .* tools/convert.py")


def test_loading_reports_what_it_read(good):
    with Engine(good, device="cpu", threads=2) as engine:
        stats = engine.load_stats
    path, _, data = parts(good)
    assert stats["verified_bytes"] == path.stat().st_size and stats["weight_bytes"] >= len(data)
    assert 0 < stats["verified_s"] <= stats["total_s"] and stats["device_s"] + stats["weights_s"] <= stats["total_s"]


def test_damaged_headers_never_crash(copy):
    """Random damage to the header: loads or is refused, nothing else."""
    path, _, _ = parts(copy)
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0] + 8
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(raw)
        for at in rng.integers(0, size, rng.integers(1, 4)):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            runner(copy, threads=1)
        except LoadError as e:
            assert str(copy) in str(e)
