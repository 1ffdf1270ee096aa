"""What the package is to a stranger: its public names, a pure import, imports that run downwards."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

import noesis
from noesis._version import __version__

ROOT = Path(__file__).parents[1]
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
    "NoesisError",
    "NoesisWarning",
    "Observed",
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
    "token_deltas",
    "wrap",
]
CORE = {"torch", "numpy", "safetensors", "loguru"}
OPTIONAL = ["accelerate", "diffusers", "lightning", "matplotlib", "numba", "peft", "sklearn", "transformers"]


def test_public_names() -> None:
    assert sorted(noesis.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(noesis))


def test_version_is_in_the_changelog_and_types_are_marked() -> None:
    assert noesis.__version__ == __version__
    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (PACKAGE / "py.typed").is_file()


# A pure import.


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds this checkout; warnings are errors there too."""
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def effects_of(code: str, tmp_path: Path) -> list[str]:
    """What running `code` does beyond defining names: prints, optional packages, CUDA."""
    report = tmp_path / "report.json"
    after = (
        "import json, pathlib, sys\n"
        f"loaded = [name for name in {OPTIONAL!r} if name in sys.modules]\n"
        "cuda = 'torch' in sys.modules and sys.modules['torch'].cuda.is_initialized()\n"
        f"pathlib.Path({str(report)!r}).write_text(json.dumps([loaded, cuda]))\n"
    )
    done = run_python("-c", f"{code}\n{after}")
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
    "    if not module.name.endswith(('_numba', '__main__')): importlib.import_module(module.name)\n"
)


@pytest.mark.parametrize("code", [ALL_NAMES, ALL_MODULES + ALL_NAMES], ids=["names", "modules"])
def test_import_has_no_effects(code: str, tmp_path: Path) -> None:
    assert effects_of(code, tmp_path) == []


def test_effects_of_an_import_are_noticed(tmp_path: Path) -> None:
    assert effects_of("import matplotlib; print('hello')", tmp_path) == ["imported matplotlib", "printed 'hello\\n'"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_initialising_cuda_is_noticed(tmp_path: Path) -> None:
    assert effects_of("import torch; torch.cuda.init()", tmp_path) == ["initialised CUDA"]


def test_help_does_not_import_torch() -> None:
    done = run_python("-X", "importtime", "-m", "noesis.cli", "--help")
    assert done.returncode == 0, done.stderr[-500:]
    assert "usage: " in done.stdout
    assert imported(done.stderr) >= {"argparse", "noesis"}
    assert imported(done.stderr).isdisjoint({"torch", "numpy", *OPTIONAL})


def test_importing_torch_is_noticed() -> None:
    assert "torch" in imported(run_python("-X", "importtime", "-c", "import torch").stderr)


def imported(importtime: str) -> set[str]:
    """The packages named in what `python -X importtime` prints."""
    return {line.split("|")[2].strip().split(".")[0] for line in importtime.splitlines() if line.count("|") == 2}


# Imports run downwards: a module imports, as it loads, only from floors below its own. The
# house's own modules that are not named here share the floor LIBRARY and may import each other,
# as may the modules of one package, as long as they do not go round in circles.

LIBRARY, TOP = 4, 5
FLOORS = {
    "errors": 0,
    "_version": 0,
    "text": 0,
    "internals": 1,
    "files": 2,
    "kernels": 2,
    "integrations": TOP,
    "cli": TOP,
}
HOST_SIDE = {"trace", "soulprint", "comparison"}
DEVICE_SIDE = {"judging", "observing", "recorder", "sites", "switch", "wrapping"}
COMPILERS = ("triton", "numba")  # modules named after one hold its kernels; others import them late

Imports = dict[str, set[str]]


def sources(package: Path) -> dict[str, ast.Module]:
    """The syntax trees of a package by dotted name below it; the package itself is `""`."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


def imports(node: ast.AST, late: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports below a node that run as its module loads; with `late`, those in functions too.

    Imports for type checking only never run.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not late:
            continue
        elif isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for other in child.orelse:
                yield from imports(ast.Module([other], []), late)
        else:
            yield from imports(child, late)


def targets(trees: Mapping[str, ast.Module], packages: set[str], name: str, late: bool) -> tuple[set[str], set[str]]:
    """What a module imports: modules of the house, and packages of others."""
    own: set[str] = set()
    others: set[str] = set()
    for statement in imports(trees[name], late):
        if isinstance(statement, ast.Import):
            bases = [(alias.name, [None]) for alias in statement.names]
        else:
            bases = [(_absolute(statement, name, name in packages), [alias.name for alias in statement.names])]
        for base, members in bases:
            top, _, below = base.partition(".")
            if top != "noesis":
                others.add(top)
                continue
            for member in members:
                longer = f"{below}.{member}".lstrip(".")
                own.add(longer if member and longer in trees else below)
    return own, others


def _absolute(statement: ast.ImportFrom, name: str, is_package: bool) -> str:
    if not statement.level:
        return statement.module or ""
    parts = ["noesis", *filter(None, name.split("."))]
    keep = len(parts) - statement.level + is_package
    return ".".join([*parts[:keep], *filter(None, [statement.module])])


def compiler(name: str) -> str | None:
    """The compiler whose kernels a module holds."""
    return next((package for package in COMPILERS if name.endswith(f"_{package}")), None)


def floor(name: str) -> int:
    """How high a module stands; the root, which gathers the public names, above all."""
    return FLOORS.get(name.partition(".")[0], LIBRARY) if name else TOP + 1


def reachable(start: str, edges: Imports) -> set[str]:
    """All modules that importing `start` imports, itself only if it is in a circle."""
    seen: set[str] = set()
    todo = list(edges[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += edges[name]
    return seen


def violations(package: Path) -> list[str]:
    """Every import of a package that breaks the order of the house, in words."""
    trees = sources(package)
    packages = {".".join(p.parent.relative_to(package).parts) for p in package.rglob("__init__.py")}
    loading: Imports = {}
    found: list[str] = []
    for name in trees:
        loading[name], others = targets(trees, packages, name, late=False)
        foreign = others - CORE - sys.stdlib_module_names - {compiler(name)}
        found += [f"{name} imports {other} as it loads" for other in sorted(foreign)]
    for name, below in loading.items():
        for other in sorted(below - {name}):
            package = compiler(other)
            if package is not None and package != compiler(name):
                found.append(f"{name} imports {other}, and with it {package}, as it loads")
            siblings = name.split(".")[0] == other.split(".")[0] or floor(name) == floor(other) == LIBRARY
            if not (floor(other) < min(floor(name), TOP) or siblings):
                found.append(f"{name or 'noesis'} imports {other or 'noesis'}")
        if name in reachable(name, loading):
            found.append(f"{name} is in a circle of imports")
    for name in sorted(HOST_SIDE & set(trees)):
        late, _ = targets(trees, packages, name, late=True)
        for other in sorted(DEVICE_SIDE & (late | reachable(name, loading))):
            found.append(f"{name} reaches {other}")
    return found


def test_imports_run_downwards() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("errors.py", "from . import files", "errors imports files"),
        ("files.py", "from .kernels import moments", "files imports kernels.moments"),
        ("kernels/moments.py", "from ..trace import Trace", "kernels.moments imports trace"),
        ("kernels/moments.py", "import noesis.v01", "kernels.moments imports v01"),
        ("kernels/moments.py", "import triton", "kernels.moments imports triton as it loads"),
        ("kernels/moments.py", "from . import a_triton", "imports kernels.a_triton, and with it triton, as it loads"),
        ("kernels/a_triton.py", "from . import b_numba", "imports kernels.b_numba, and with it numba, as it loads"),
        ("trace.py", "from .middle import x", "trace reaches observing"),
        ("trace.py", "def f():\n    from .recorder import x", "trace reaches recorder"),
        ("plots.py", "if True:\n    import matplotlib.pyplot", "plots imports matplotlib as it loads"),
        ("plots.py", "from noesis import wrap", "plots imports noesis"),
        ("observing.py", "from .middle import x", "observing is in a circle of imports"),
        ("plots.py", "from .integrations import diffusers", "plots imports integrations.diffusers"),
        ("cli.py", "from .integrations.diffusers import x", "cli imports integrations.diffusers"),
        ("integrations/diffusers.py", "class A:\n    from .. import cli", "integrations.diffusers imports cli"),
        ("__init__.py", "from .cli import main", "noesis imports cli"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, name: str, source: str, expected: str) -> None:
    files = {
        **dict.fromkeys(["__init__", "kernels/__init__", "integrations/__init__", "errors", "recorder"], ""),
        **dict.fromkeys(["cli", "plots", "trace", "observing", "integrations/diffusers"], ""),
        "files": "from .errors import NoesisError",
        "kernels/moments": "import torch\n\nfrom ..errors import NoesisError",
        "kernels/a_triton": "import triton",
        "kernels/b_numba": "import numba",
        "v01": "from .files import read_json\nfrom .errors import NoesisError",
        "middle": "from typing import TYPE_CHECKING\n\nfrom .observing import wrap\nfrom .kernels import moments\n"
        "if TYPE_CHECKING:\n    from .cli import main\n\ndef f():\n    import matplotlib\n    from .cli import main",
    }
    for stem, text in files.items():
        path = tmp_path / f"{stem}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert violations(tmp_path) == []
    (tmp_path / name).write_text(source)
    assert any(expected in violation for violation in violations(tmp_path))
