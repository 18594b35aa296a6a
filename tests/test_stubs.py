"""_native.pyi says exactly what the compiled module has: names, bases, parameters, defaults and types."""
import ast
import inspect
import types
from pathlib import Path

import codefuse_triton
from codefuse_triton import _native

STUB = Path(__file__).parent.parent / "backend_src" / "codefuse_triton" / "_native.pyi"


def signature_of(function: ast.FunctionDef):
    """Parameters as (name, kind, type, default), and the result's type; `self` has no type."""
    a = function.args
    defaults = [None] * (len(a.args) - len(a.defaults)) + a.defaults
    rows = [(p.arg, "any", p.annotation, d) for p, d in zip(a.args, defaults)]
    rows += [(p.arg, "keyword", p.annotation, d) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    out = []
    for i, (name, kind, annotation, default) in enumerate(rows):
        if i == 0 and name in ("self", "arg0"):
            out.append("self")
        else:
            out.append((name, kind, ast.unparse(annotation), None if default is None else ast.literal_eval(default)))
    return out, ast.unparse(function.returns)


def parse(docstring: str, name: str = ""):
    """The signature that pybind11 writes into the first line of a docstring."""
    line = docstring.strip().split("\n")[0]
    for found, meant in {"codefuse_triton._native.": "", "collections.abc.": "", "typing.SupportsInt | typing.SupportsIndex": "int",
                         "typing.SupportsFloat | typing.SupportsIndex": "float", "dict[str, object]": "dict[str, Any]"}.items():
        line = line.replace(found, meant)
    return signature_of(ast.parse(f"def {'' if name else 'f'}{line}: ...").body[0])


def is_public(name: str) -> bool:
    return name == "__init__" or not name.startswith("_")


def described():
    """The stub: name -> signature, or for a class (bases, members)."""
    out = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            out[node.name] = signature_of(node)
        elif isinstance(node, ast.ClassDef):
            members = {f.name: ("property" if f.decorator_list else "method", signature_of(f)) for f in node.body if isinstance(f, ast.FunctionDef)}
            out[node.name] = ([ast.unparse(b) for b in node.bases], members)
        elif isinstance(node, ast.AnnAssign):
            out[node.target.id] = ast.unparse(node.annotation)
    return out


def compiled():
    out = {}
    for name, value in vars(_native).items():
        if not is_public(name):
            continue
        if inspect.isclass(value):
            members = {}
            for key, member in vars(value).items():
                if isinstance(member, property):
                    members[key] = ("property", parse(member.fget.__doc__))
                    assert member.fset is None
                elif is_public(key) and key in (member.__doc__ or ""):  # an __init__ without a signature is object's
                    members[key] = ("method", parse(member.__doc__, key))
            bases = [b.__name__ for b in value.__bases__ if issubclass(b, BaseException)]
            out[name] = (bases, members)
        elif isinstance(value, types.ModuleType):
            out[name] = "ModuleType"
        else:
            out[name] = parse(value.__doc__, name)
    return out


def test_stub_is_the_module():
    stub, module = described(), compiled()
    assert stub.keys() == module.keys()
    for name in module:
        assert stub[name] == module[name], name


def test_stub_and_marker_are_installed():
    folder = Path(codefuse_triton.__file__).parent
    if folder == STUB.parent or (folder / "py.typed").exists():  # links of a development build have neither
        assert (folder / "py.typed").exists() and (folder / "_native.pyi").read_text() == STUB.read_text()


def test_the_wrapper_hides_no_option():
    wrapper = inspect.signature(codefuse_triton.Engine.submit).parameters
    _, members = described()["Engine"]
    native = [row for row in members["submit"][1][0] if row != "self"]
    derived = {"before", "after", "prefix_ids", "truncated_tokens"}  # from the prompt
    assert {row[0] for row in native} - derived <= set(wrapper)
    for name, _, _, default in native:
        if name not in derived and default not in (None, []):
            assert wrapper[name].default == default, name
