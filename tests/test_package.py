"""What the package is to a stranger: its public names, a pure import, imports that run downwards."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import noesis
from helpers.checkout import ROOT
from helpers.processes import python
from noesis._version import __version__

PACKAGE = ROOT / "src" / "noesis"

PUBLIC = [
    "Activations",
    "Alarm",
    "Alarms",
    "Calibration",
    "Codebook",
    "Comparison",
    "Divergence",
    "DriftMonitor",
    "Fidelity",
    "ModelDiff",
    "NoesisError",
    "NoesisWarning",
    "Observed",
    "ParameterNorms",
    "Routes",
    "RunState",
    "Soulprint",
    "Surprise",
    "TokenDeltas",
    "Trace",
    "Wrapped",
    "__version__",
    "capture",
    "compare",
    "diff",
    "token_deltas",
    "unwrap",
    "unwrapped",
    "wrap",
]
CORE = {"torch", "numpy", "safetensors", "loguru"}
OPTIONAL = ["accelerate", "diffusers", "lightning", "matplotlib", "numba", "pandas", "peft", "sklearn", "transformers"]


def test_public_names() -> None:
    assert sorted(noesis.__all__) == PUBLIC
    # Not imported yet, in a process that has used nothing, and without what the package needs for itself.
    code = "import noesis; print(*(name for name in dir(noesis) if name[:2] != '__'))"
    assert python("-c", code).stdout.split() == [name for name in PUBLIC if name != "__version__"]
    code = "import noesis.plots; print({'plots', 'files', 'Trace', '__version__'} - set(dir(noesis)))"
    assert python("-c", code).stdout == "set()\n"


def test_version_is_in_the_changelog_and_types_are_marked() -> None:
    assert noesis.__version__ == __version__
    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (PACKAGE / "py.typed").is_file()


# A pure import.


def effects_of(code: str, tmp_path: Path) -> list[str]:
    """What running `code` does beyond defining names: prints, optional packages, CUDA."""
    report = tmp_path / "report.json"
    after = (
        "import json, pathlib, sys\n"
        f"loaded = [name for name in {OPTIONAL!r} if name in sys.modules]\n"
        "cuda = 'torch' in sys.modules and sys.modules['torch'].cuda.is_initialized()\n"
        f"pathlib.Path({str(report)!r}).write_text(json.dumps([loaded, cuda]))\n"
    )
    done = python("-W", "error", "-c", f"{code}\n{after}")
    assert done.returncode == 0, done.stderr
    loaded, cuda = json.loads(report.read_text())
    effects = [f"imported {name}" for name in loaded]
    effects += [f"printed {text!r}" for text in (done.stdout, done.stderr) if text]
    return [*effects, "initialised CUDA"] if cuda else effects


# A submodule that is imported becomes an attribute of the package, also where a public name was meant.
ALL_NAMES = (
    "import inspect, noesis\n"
    "values = {name: getattr(noesis, name) for name in noesis.__all__}\n"
    "modules = [name for name, value in values.items() if inspect.ismodule(value)]\n"
    "assert not modules, f'modules under public names: {modules}'"
)
ALL_MODULES = (
    "import importlib, pkgutil, noesis\n"
    "for module in pkgutil.walk_packages(noesis.__path__, 'noesis.'):\n"
    "    if not module.name.endswith(('_numba', '__main__', '.pytest_plugin')): importlib.import_module(module.name)\n"
)


def test_import_has_no_effects(tmp_path: Path) -> None:
    """Of the names alone, then of every module beside them."""
    assert effects_of(f"{ALL_NAMES}\n{ALL_MODULES}{ALL_NAMES}", tmp_path) == []


def test_effects_of_an_import_are_noticed(tmp_path: Path) -> None:
    assert effects_of("import matplotlib; print('hello')", tmp_path) == ["imported matplotlib", "printed 'hello\\n'"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_initialising_cuda_is_noticed(tmp_path: Path) -> None:
    assert effects_of("import torch; torch.cuda.init()", tmp_path) == ["initialised CUDA"]


def test_help_does_not_import_torch() -> None:
    done = python("-W", "error", "-X", "importtime", "-m", "noesis.cli", "--help")
    assert done.returncode == 0, done.stderr[-500:]
    assert "usage: " in done.stdout
    assert imported(done.stderr) >= {"argparse", "noesis"}
    assert imported(done.stderr).isdisjoint({"torch", "numpy", *OPTIONAL})


def test_importing_numpy_is_noticed() -> None:
    assert "numpy" in imported(python("-W", "error", "-X", "importtime", "-c", "import numpy").stderr)


def imported(importtime: str) -> set[str]:
    """The packages named in what `python -X importtime` prints."""
    return {line.split("|")[2].strip().split(".")[0] for line in importtime.splitlines() if line.count("|") == 2}


# ---------------------------------------------------------------- the house
#
# Imports run downwards: a file imports from packages that the table allows its own, and only through their
# doors. Imports inside functions and those for typing alone count too.

#: What each package, or file beside the packages, may import.
HOUSE: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "text": set(),
    "numerics": set(),
    "internals": set(),
    "kernels": {"internals"},
    "files": set(),
    "layers": {"internals"},
    "plots": {"files", "numerics"},
    "results": {"plots", "files", "kernels", "numerics"},
    "surprise": {"results", "files", "kernels", "numerics"},
    "observing": {"surprise", "results", "layers", "kernels", "internals", "numerics"},
    "distributed": {"surprise", "results", "files", "kernels", "internals", "numerics"},
    "wrapping": {
        *("observing", "distributed", "surprise", "results", "layers", "kernels", "files", "internals", "numerics"),
    },
    "integrations": {"wrapping", "surprise", "results", "layers", "files"},
    "testing": {"results", "files", "numerics"},
    "diffing": {"wrapping", "results", "layers", "numerics"},
    "interp": {"wrapping", "observing", "results", "plots", "layers", "files", "internals", "numerics"},
    "cli": {"interp", "diffing", "wrapping", "observing", "results", "plots", "layers", "files"},
    "": {"diffing", "wrapping", "observing", "surprise", "results"},
}
EVERYWHERE = {"_version", "errors", "text"}  # imports nothing itself
#: Doors within packages; of the others the package itself is the door.
DOORS = {
    *("kernels.coding", "kernels.moments", "kernels.pooling", "kernels.stepping", "kernels.routing"),
    *("kernels.norms", "kernels.dispatch", "kernels.layout", "kernels.rows", "kernels.runtime", "files.v01"),
}
#: Files that another package imports, which they may take for granted.
LOADED_BY = {"testing.pytest_plugin": "pytest"}
COMPILERS = ("triton", "numba")  # files named after one hold its kernels; others import them late


class Import(NamedTuple):
    """One name that a file imports from another of the house, or from a package of others."""

    module: str
    name: str
    late: bool


def sources(package: Path) -> dict[str, ast.Module]:
    """The syntax trees of a package by dotted name below it; the package itself is `""`."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


def imports(node: ast.AST, late: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """The imports below a node, and whether they run later than the file loads, if at all."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, late
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, True)
        elif isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            yield from imports(ast.Module(child.body, []), True)
            yield from imports(ast.Module(child.orelse, []), late)
        else:
            yield from imports(child, late)


def imported_by(trees: Mapping[str, ast.Module], packages: set[str], name: str) -> tuple[list[Import], list[Import]]:
    """What a file imports: from the house, and from others."""
    own, others = [], []
    for statement, late in imports(trees[name]):
        if isinstance(statement, ast.Import):
            pairs = [(alias.name, "") for alias in statement.names]
        else:
            base = _absolute(statement, name, name in packages)
            pairs = [(base, alias.name) for alias in statement.names]
        for base, member in pairs:
            top, _, below = base.partition(".")
            if top != "noesis":
                others.append(Import(top, member, late))
            elif (longer := f"{below}.{member}".strip(".")) in trees:
                own.append(Import(longer, "", late))
            else:
                own.append(Import(below, member, late))
    return own, others


def _absolute(statement: ast.ImportFrom, name: str, is_package: bool) -> str:
    if not statement.level:
        return statement.module or ""
    parts = ["noesis", *filter(None, name.split("."))]
    keep = len(parts) - statement.level + is_package
    return ".".join([*parts[:keep], *filter(None, [statement.module])])


def compiler(name: str) -> str | None:
    """The compiler whose kernels a file holds."""
    return next((package for package in COMPILERS if name.endswith(f"_{package}")), None)


def room(name: str) -> str:
    """The package that a file is in, or the file itself beside them."""
    return name.partition(".")[0]


def through_a_door(name: str, other: str) -> bool:
    """Whether a file may open another: of its own package, or a door of another's."""
    inner = next((door for door in DOORS if name == door or name.startswith(f"{door}.")), None)
    if room(name) == room(other):  # a folder within a package has its door for the package's other files too
        folder = next((door for door in DOORS if other.startswith(f"{door}.")), None)
        return folder is None or folder == inner or compiler(other) is not None or compiler(name) is not None
    return other == room(other) or other in DOORS


def circle(start: str, edges: Mapping[str, set[str]]) -> bool:
    """Whether a file imports itself by way of others."""
    seen: set[str] = set()
    todo = list(edges[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += edges.get(name, ())
    return start in seen


def violations(package: Path) -> list[str]:
    """Every import of a package that breaks the order of the house, in words."""
    trees = sources(package)
    packages = {".".join(p.parent.relative_to(package).parts) for p in package.rglob("__init__.py")}
    edges: dict[str, set[str]] = {}
    found: list[str] = []
    for name in trees:
        own, others = imported_by(trees, packages, name)
        edges[name] = {given.module for given in own} - {name}
        loading = {given.module for given in others if not given.late}
        foreign = loading - CORE - sys.stdlib_module_names - {compiler(name), LOADED_BY.get(name)}
        found += [f"{name} imports {other} as it loads" for other in sorted(foreign)]
        for other, member, late in own:
            needs = compiler(other)
            if needs is not None and needs != compiler(name) and not late:
                found.append(f"{name} imports {other}, and with it {needs}, as it loads")
            if room(name) != room(other) and room(other) not in HOUSE.get(room(name), set()) | EVERYWHERE:
                found.append(f"{name or 'noesis'} imports {other or 'noesis'}, which is not below it")
            elif not through_a_door(name, other):
                found.append(f"{name} imports {other} past the door")
            elif member.startswith("_") and not member.startswith("__") and room(name) != room(other):
                found.append(f"{name} imports {member} of {other}, which is private")
    # A package's own door may be named by the files behind it in no import: so no file is in a circle.
    return found + [f"{name} is in a circle of imports" for name in trees if circle(name, edges)]


def test_imports_run_downwards() -> None:
    assert violations(PACKAGE) == []


MOST_LINES = 400
#: Files that are longer, and by how much they may be: these can only shrink.
LONGER: dict[str, int] = {}


def test_files_are_of_one_purpose_and_so_of_few_lines() -> None:
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    found = {name: count for name, count in lines.items() if count > LONGER.get(name, MOST_LINES)}
    assert found == {}, "cut them by purpose"
    short = [name for name in LONGER if lines.get(name, 0) <= MOST_LINES]
    assert short == [], "no longer longer: take them off the list"


def test_the_picture_is_of_this_table() -> None:
    """`python tools/draw_house.py` draws it."""
    drawing = runpy.run_path(str(ROOT / "tools" / "draw_house.py"))
    assert drawing["table"]() == HOUSE
    assert drawing["drawn"](HOUSE) == (ROOT / "docs" / "house.svg").read_text(encoding="utf-8")


def test_the_table_has_every_package_and_no_circle() -> None:
    assert set(HOUSE) == {room(name) for name in sources(PACKAGE)}
    for name in HOUSE:
        assert not circle(name, HOUSE), f"{name} may import itself"


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("errors.py", "from . import files", "errors imports files, which is not below it"),
        ("kernels/moments/op.py", "from ...results import Trace", "imports results, which is not below it"),
        ("kernels/moments/op.py", "import noesis.results", "imports results, which is not below it"),
        ("kernels/moments/op.py", "import triton", "kernels.moments.op imports triton as it loads"),
        ("kernels/moments/op.py", "from . import _triton", "and with it triton, as it loads"),
        ("kernels/moments/_triton.py", "from . import _numba", "and with it numba, as it loads"),
        ("results/trace.py", "def f():\n    from ..observing import Recorder", "results.trace imports observing"),
        (
            "results/trace.py",
            "if TYPE_CHECKING:\n    from ..observing import Recorder",
            "results.trace imports observing",
        ),
        ("results/trace.py", "from ..files.formats import save", "results.trace imports files.formats past the door"),
        ("observing/site.py", "from ..kernels.moments.op import x", "imports kernels.moments.op past the door"),
        ("kernels/rows.py", "from .moments.op import x", "kernels.rows imports kernels.moments.op past the door"),
        ("observing/site.py", "from ..results import _few", "observing.site imports _few of results, which is private"),
        ("results/trace.py", "from .soulprint import x", "results.trace is in a circle of imports"),
        ("results/trace.py", "def f():\n    from .soulprint import x", "results.trace is in a circle of imports"),
        ("files/formats.py", "if True:\n    import matplotlib.pyplot", "files.formats imports matplotlib as it loads"),
        ("files/formats.py", "from noesis import wrap", "files.formats imports noesis"),
        ("results/trace.py", "from .. import cli", "results.trace imports cli"),
        ("observing/site.py", "class A:\n    from .. import cli", "observing.site imports cli"),
        ("__init__.py", "from .cli import main", "noesis imports cli"),
        ("helpers.py", "from .files import save", "helpers imports files, which is not below it"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, name: str, source: str, expected: str) -> None:
    files = {
        **dict.fromkeys(["__init__", "errors", "kernels/rows", "cli/__init__", "observing/__init__"], ""),
        "files/__init__": "from .formats import save",
        "files/formats": "from ..errors import NoesisError\n\ndef f():\n    import matplotlib",
        "kernels/__init__": "",
        "kernels/moments/__init__": "from .op import observe",
        "kernels/moments/op": "import torch\n\nfrom .. import rows\n\ndef f():\n    from . import _triton",
        "kernels/moments/_triton": "import triton",
        "kernels/moments/_numba": "import numba",
        "results/__init__": "from .trace import Trace",
        "results/trace": "from ..files import save",
        "results/soulprint": "from .trace import Trace",
        "observing/site": "from ..kernels.moments import observe\nfrom ..results import Trace",
        "cli/main": "from .. import files",
    }
    for stem, text in files.items():
        path = tmp_path / f"{stem}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    assert violations(tmp_path) == []
    (tmp_path / name).write_text(source)
    assert any(expected in violation for violation in violations(tmp_path)), violations(tmp_path)


def test_files_of_tests_have_names_of_their_own() -> None:
    """Without packages, pytest imports them by name, and could not collect two of one name together."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
