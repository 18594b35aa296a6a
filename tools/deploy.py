#!/usr/bin/env python3
"""Lays out a named model - tokenizer, generator, detokenizer and the ensemble that joins them - in a Triton model repository.

    python tools/deploy.py CHECKPOINT_DIR codefuse-13b --repository /data/models --set slots=32
    python tools/deploy.py /data/13b-q8 codefuse-13b --version 2 --repository /data/models    # another version of its generator
    python tools/serve.py --repository /data/models

The source is a checkpoint that tools/convert.py reads, which is converted, or a weights directory (also of tools/quantize.py), whose files are
linked or copied. The ensemble has the name given, the other three NAME_tokenizer, NAME_generator and NAME_detokenizer; any number of named models share a
repository. What fails or is killed leaves the repository as it was; what is there is replaced only with --replace.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from codefuse_triton import contract
from codefuse_triton.request import parse_settings

import convert
import inspect_weights
from checkpoint import CheckpointError, is_weights_directory, read_json

MODELS = Path(__file__).resolve().parent.parent / "model_repository"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PARTS = (contract.GENERATOR, contract.TOKENIZER, contract.DETOKENIZER, contract.ENSEMBLE)  # in the order of installation: the ensemble is the last


def names_of(name: str) -> dict[str, str]:
    """What the four models of a named one are called."""
    return {part: name if part == contract.ENSEMBLE else f"{name}_{part}" for part in PARTS}


@contextlib.contextmanager
def _stage(repository: Path, name: str) -> Iterator[Path]:
    """A directory on the repository's file system and outside it, if that can be: Triton takes every directory in it for a model."""
    new = not repository.exists()
    repository.mkdir(parents=True, exist_ok=True)
    place = repository.parent if repository.parent.stat().st_dev == repository.stat().st_dev and os.access(repository.parent, os.W_OK) else repository
    start = f".{repository.name}-deploy-{name}-"
    for stale in place.glob(f"{start}*"):
        pid = stale.name.removeprefix(start)
        if pid.isdigit() and (int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists()):
            _undo(stale, repository, name)
    stage = place / f"{start}{os.getpid()}"
    stage.mkdir()
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):  # it has a model now
                repository.rmdir()


def _undo(stage: Path, repository: Path, name: str) -> None:
    """Removes what a killed run has left; models that it had only half replaced come back."""
    kept = list((stage / "old").iterdir()) if (stage / "old").is_dir() else []
    if kept and any((stage / new).exists() for new in names_of(name).values()):
        for model in kept:
            shutil.rmtree(repository / model.name, ignore_errors=True)
            os.rename(model, repository / model.name)
    shutil.rmtree(stage)


def _make_weights(source: Path, target: Path, dtype: str, ignore: set[str], progress: Any) -> None:
    if not is_weights_directory(source):
        convert.convert(source, target, dtype, ignore, progress=progress)
    else:
        _check(source)
        config = read_json(source / "config.json")
        target.mkdir(parents=True, exist_ok=True)
        for file in ["config.json", *(f["name"] for f in config.get("files", [])), *config.get("tokenizer_files", [])]:
            try:
                os.link((source / file).resolve(), target / file)
            except OSError:  # of another file system
                shutil.copyfile(source / file, target / file)


def _check(weights: Path) -> None:
    for f in inspect_weights.inspect(weights)["files"]:
        if f["state"] == "damaged":
            raise CheckpointError(f"{weights}/{f['file']} is damaged: {f['why']}")


def _put_model_py(part: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if part == contract.ENSEMBLE:
        (directory / ".gitkeep").touch()
    else:
        shutil.copyfile(MODELS / part / "1" / "model.py", directory / "model.py")


def _install(staged: dict[Path, Path], old: Path) -> None:
    """Renames each key to its value; what is there goes to `old`. On an error everything is as it was."""
    old.mkdir()
    done: list[tuple[Path, Path, Path | None]] = []
    try:
        for new, place in staged.items():
            kept = old / place.name if place.exists() else None
            if kept:
                os.rename(place, kept)
            done.append((new, place, kept))
            os.rename(new, place)
    except BaseException:
        for new, place, kept in reversed(done):
            if place.exists():
                os.rename(place, new)
            if kept:
                os.rename(kept, place)
        raise


def _ours(directory: Path) -> bool:
    config = directory / "config.pbtxt"
    return config.is_file() and contract.WRITTEN_FROM in config.read_text(errors="replace")


def deploy(source: Path, name: str, repository: Path, *, dtype: str = "auto", version: int = 1, replace: bool = False, in_place: bool = False,
           settings: Mapping[str, str] = {}, ignore: set[str] = frozenset(), progress: Any = None) -> dict[str, str]:
    """Returns the names of the four models. CheckpointError or ValueError names what is wrong; then nothing has changed.

    dtype: as for convert. version: of the generator; beyond the first of a model that is there, only that version is added. in_place: a weights directory is
    served from where it is. settings: of the generator.
    """
    if not NAME.fullmatch(name):
        raise CheckpointError(f"name is {name!r}; expected up to 100 letters, digits, '.', '_' and '-', a letter or digit first")
    if version < 1:
        raise CheckpointError(f"version is {version}; expected 1 or more")
    if dtype not in ("auto", *convert.DTYPES):
        raise CheckpointError(f"dtype is {dtype!r}; expected auto, {', '.join(convert.DTYPES)}")
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such directory; expected a checkpoint or a weights directory")
    if dtype != "auto" and is_weights_directory(source):
        raise CheckpointError(f"dtype is {dtype!r}, but {source} is a weights directory, which is taken as it is")
    parse_settings(contract.GENERATOR, settings)
    if "weights" in settings:
        raise CheckpointError("setting weights: the source says where they are; with --in-place they are served from there")
    if in_place and not is_weights_directory(source):
        raise CheckpointError(f"{source} cannot be served in place: only a weights directory can")
    names, repository = names_of(name), repository.resolve()
    there = [n for n in names.values() if (repository / n).exists()]
    for n in there:
        if not _ours(repository / n):
            raise CheckpointError(f"{repository / n} is not a model of this tool; choose another name")
    generator = names[contract.GENERATOR]
    adding = len(there) == len(names) and not replace and not (repository / generator / str(version)).exists()
    if there and not replace and not adding:
        missing = [n for n in names.values() if n not in there]
        raise CheckpointError(f"{repository} has {', '.join(there)}{f' version {version}' if not missing else ''} already"
                              f"{f' but no ' + ', '.join(missing) if missing else ''}; replace it with --replace"
                              f"{'' if missing else ', or add a version with --version'}")
    if adding and settings:
        raise CheckpointError(f"settings belong to all versions of {generator}: edit its config.pbtxt, or deploy under another name")
    if adding and (shared := _setting_in(repository / generator, "weights")):
        raise CheckpointError(f"{generator}/config.pbtxt sets weights to {shared!r}, which all versions would serve; put a link named "
                              f"{contract.WEIGHTS_LINK} to it into each version directory and clear the setting, or deploy under another name")
    with _stage(repository, name) as stage:
        target = stage / generator / str(version)
        if in_place:
            _check(source)
            target.mkdir(parents=True)
            (target / contract.WEIGHTS_LINK).symlink_to(source.resolve())
        else:
            _make_weights(source, target, dtype, ignore, progress)
        weights = contract.weights_directory(stage / generator, str(version), "")
        if not read_json(weights / "config.json").get("tokenizer_files"):
            raise CheckpointError(f"{source} has no tokenizer files; tokenizer and detokenizer need them")
        _put_model_py(contract.GENERATOR, target)
        if adding:
            _check_same_tokenizer(weights, repository / names[contract.TOKENIZER])
            _install({target: repository / generator / str(version)}, stage / "old")
            return names
        place = str(source.resolve()) if in_place else f"../{generator}/{version}"
        given = {contract.GENERATOR: settings, contract.TOKENIZER: {"tokenizer_dir": place},
                 contract.DETOKENIZER: {"tokenizer_dir": place, "generator": generator}, contract.ENSEMBLE: {}}
        for part in PARTS:
            if part != contract.GENERATOR:
                _put_model_py(part, stage / names[part] / "1")
            (stage / names[part] / "config.pbtxt").write_text(contract.config_pbtxt(part, names, given[part]), encoding="utf-8")
        _install({stage / names[part]: repository / names[part] for part in PARTS}, stage / "old")
    return names


def _setting_in(model: Path, name: str) -> str:
    found = re.search(rf'key:\s*"{name}"\s*,?\s*value:?\s*\{{\s*string_value:\s*("(?:[^"\\]|\\.)*")', (model / "config.pbtxt").read_text(encoding="utf-8"))
    return contract.unquoted(found[1]) if found else ""


def _check_same_tokenizer(weights: Path, tokenizer: Path) -> None:
    """The versions of a generator share one tokenizer."""
    directory = (tokenizer / _setting_in(tokenizer, "tokenizer_dir")).resolve()
    for file in read_json(weights / "config.json")["tokenizer_files"]:
        if not (directory / file).is_file() or (directory / file).read_bytes() != (weights / file).read_bytes():
            raise CheckpointError(f"{file} differs from that of {tokenizer.name}, in {directory}: versions share a tokenizer; deploy under another name")


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}; expected SETTING=VALUE")
    return key, value


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path, help="checkpoint that tools/convert.py reads, or weights directory")
    p.add_argument("name", help="of the ensemble; clients ask for it as their model")
    p.add_argument("--repository", type=Path, default=MODELS, help="made if it is not there (default: %(default)s)")
    p.add_argument("--dtype", default="auto", choices=["auto", *convert.DTYPES], help="of a converted checkpoint's tensors; auto keeps each tensor's own")
    p.add_argument("--version", type=int, default=1, help="of the generator (default: %(default)s); Triton serves the greatest")
    p.add_argument("--replace", action="store_true", help="replace a model of this name")
    p.add_argument("--in-place", action="store_true", help="serve a weights directory from where it is")
    p.add_argument("--set", type=_setting, action="append", default=[], metavar="SETTING=VALUE", help="a setting of the generator, e.g. device=cuda:1")
    p.add_argument("--ignore-field", action="append", default=[], metavar="NAME", help="a config.json field that does not matter")
    a = p.parse_args(argv)
    try:
        names = deploy(a.source, a.name, a.repository, dtype=a.dtype, version=a.version, replace=a.replace, in_place=a.in_place,
                       settings=dict(a.set), ignore=set(a.ignore_field))
    except (ValueError, OSError) as e:
        print(f"deploy: {e}", file=sys.stderr)
        return 1
    print(f"{a.name}: {', '.join(names.values())} in {a.repository}, generator version {a.version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
