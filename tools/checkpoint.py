"""Reads a Hugging Face checkpoint directory lazily, without torch: safetensors and torch-zip `.bin`, sharded or not.

Nothing is loaded until a tensor is asked for, and then only that tensor (both formats are memory-mapped).
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
_SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BF16,
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}
_TORCH_STORAGES = {
    "DoubleStorage": np.dtype("<f8"), "FloatStorage": np.dtype("<f4"), "HalfStorage": np.dtype("<f2"), "BFloat16Storage": BF16,
    "LongStorage": np.dtype("<i8"), "IntStorage": np.dtype("<i4"), "ShortStorage": np.dtype("<i2"), "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"), "BoolStorage": np.dtype("?"),
}


class CheckpointError(ValueError):
    """A checkpoint that is not what was expected; the message names file, field or tensor, value and expectation."""


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: where it is, and how to get it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    load: Callable[[], np.ndarray]  # a read-only view of the mapped file, [*shape]


def read_json(path: Path) -> dict:
    """The JSON object in `path`; CheckpointError names the file and what is wrong."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def is_weights_directory(directory: Path) -> bool:
    """Whether our tools wrote it (tools/weights_writer.py)."""
    return (directory / "config.json").is_file() and "format_version" in read_json(directory / "config.json")


def _header(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file and its size in bytes."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        if size < 8 or n > size - 8:
            raise CheckpointError(f"{path}: truncated: header says {n} bytes, the file has {size}")
        try:
            header = json.loads(f.read(n))
        except ValueError as e:
            raise CheckpointError(f"{path}: header is not JSON ({e})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: expected a JSON object as header, found {type(header).__name__}")
    return header, n


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors: __metadata__, empty if it has none."""
    return dict(_header(path)[0].get("__metadata__", {}))


def read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """Header of one safetensors file (https://github.com/huggingface/safetensors#format), checked against its size."""
    size, (header, n) = path.stat().st_size, _header(path)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has dtype {entry['dtype']}; known are {', '.join(_SAFETENSORS_DTYPES)}")
        dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        want = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if end - begin != want or 8 + n + end > size:
            raise CheckpointError(f"{path}: tensor {name} needs {want} bytes at {begin}..{end}; the file has {size - 8 - n} bytes of data")
        tensors[name] = TensorInfo(name, shape, dtype, path, _mapped(path, 8 + n + begin, dtype, shape))
    return tensors


def _mapped(path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64))
        raw = np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(count * dtype.itemsize,))
        return raw.view(dtype).reshape(shape)

    return load


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    numel: int


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles a torch state dict to descriptions of tensors; refuses every other global, so no code can run."""

    def __init__(self, data: bytes, path: Path):
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return _rebuild_tensor if name == "_rebuild_tensor_v2" else lambda tensor, *_: tensor
        if module == "torch" and name in _TORCH_STORAGES:
            return _TORCH_STORAGES[name]
        raise CheckpointError(f"{self._path}: pickle asks for {module}.{name}, which a weights file does not need; refused")

    def persistent_load(self, pid):
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise CheckpointError(f"{self._path}: unknown persistent object {pid!r}")
        return _Storage(key, dtype, numel)


def _rebuild_tensor(storage, offset, size, stride, *_):
    return storage, offset, tuple(size), tuple(stride)


def read_torch_zip(path: Path) -> dict[str, TensorInfo]:
    """Tensors of a `torch.save` file in its zip form (the default since torch 1.6)."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: not a zip: files of torch < 1.6 are not read; save it again with a current torch or as safetensors")
    with zipfile.ZipFile(path) as archive:
        entries = {e.filename: e for e in archive.infolist()}
        pickles = [n for n in entries if n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{path}: expected one data.pkl, found {len(pickles)}")
        root = pickles[0][: -len("data.pkl")]
        state = _TensorUnpickler(archive.read(pickles[0]), path).load()
        if not isinstance(state, dict):
            raise CheckpointError(f"{path}: expected a state dict, found {type(state).__name__}")
        tensors = {}
        for name, value in state.items():
            if not (isinstance(value, tuple) and len(value) == 4 and isinstance(value[0], _Storage)):
                raise CheckpointError(f"{path}: entry {name} is not a tensor")
            storage, offset, shape, stride = value
            entry = entries.get(f"{root}data/{storage.key}")
            if entry is None or entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: storage {storage.key} of {name} is missing or compressed")
            tensors[name] = TensorInfo(name, shape, storage.dtype, path, _strided(path, entry, storage, offset, shape, stride))
    return tensors


def _strided(path: Path, entry: zipfile.ZipInfo, storage: _Storage, offset: int, shape, stride) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        with open(path, "rb") as f:  # a local zip header is 30 bytes and two variable fields
            f.seek(entry.header_offset + 26)
            name_len, extra_len = np.frombuffer(f.read(4), "<u2")
        start = entry.header_offset + 30 + int(name_len) + int(extra_len)
        itemsize = storage.dtype.itemsize
        raw = np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=(storage.numel * itemsize,)).view(storage.dtype)
        return np.lib.stride_tricks.as_strided(raw[offset:], shape, [s * itemsize for s in stride], writeable=False)

    return load


def open_checkpoint(directory: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint directory: *.safetensors if there are any, else *.bin, following the shard index."""
    for index_name, single, read in (
        ("model.safetensors.index.json", "model.safetensors", read_safetensors),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", read_torch_zip),
    ):
        if (directory / index_name).exists():
            weight_map = read_json(directory / index_name).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{directory / index_name}: no weight_map")
            tensors = {}
            for file in sorted(set(weight_map.values())):
                if not (directory / file).is_file():
                    raise CheckpointError(f"{directory / index_name} names {file}, which does not exist")
                tensors.update(read(directory / file))
            missing = sorted(set(weight_map) - set(tensors))
            if missing:
                raise CheckpointError(f"{directory / index_name} names {missing[0]} ({len(missing)} in all), which no shard holds")
            return tensors
        if (directory / single).exists():
            return read(directory / single)
    raise CheckpointError(f"{directory}: no model.safetensors, pytorch_model.bin or shard index of either")
