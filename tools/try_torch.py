"""Run the core's tests on another version of torch, in a virtual environment of its own.

    python tools/try_torch.py 2.6.0 2.11.0
    python tools/try_torch.py --python 3.13 2.15.0
    python tools/try_torch.py --pre            # the newest pre-release that the package index has

Each environment lies in a temporary folder and is gone afterwards (`--keep FOLDER` leaves them there). They are made by
uv where it is installed, which takes half a minute, else by venv and pip. The core's tests are those marked `core`:
everything that touches torch and Triton, without transformers, diffusers and the like. A row of a Markdown table is
printed for each version; the exit status is that of the worst.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("pytest>=8.2", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100", "numba>=0.61", "setuptools")
#: Triton's interpreter before 3.7, which came with torch 2.12, does not go with NumPy 2.4.
OLD_INTERPRETER = (2, 12)
VERSIONS = """
import importlib.util, platform, numpy, torch
found = [torch.__version__.partition("+")[0], "none", platform.python_version(), numpy.__version__]
if importlib.util.find_spec("triton"):
    import triton
    found[1] = triton.__version__
print("| " + " | ".join(found), end=" ")
"""


def requirements(torch: str | None) -> list[str]:
    """What to install for a version of torch; None for the newest pre-release."""
    if torch is None:
        return ["torch", *TOOLS]
    parts = tuple(int(part) for part in re.findall(r"\d+", torch)[:2])
    return [f"torch=={torch}", *TOOLS, *(["numpy<2.4"] if parts < OLD_INTERPRETER else [])]


def run(*command: str | Path, **options: object) -> None:
    """Run a command; its output shows."""
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def install(folder: Path, torch: str | None, python: str) -> Path:
    """Make an environment; returns its interpreter."""
    given = [*requirements(torch), "-e", str(ROOT)]
    interpreter = folder / "bin" / "python"
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv:
        run(uv, "venv", "--quiet", "--clear", "--python", python, folder)
        pre = [] if torch else ["--prerelease", "allow"]
        run(uv, "pip", "install", "--quiet", "--python", interpreter, *pre, *given)
    else:
        run(shutil.which(f"python{python}") or sys.executable, "-m", "venv", folder)
        run(interpreter, "-m", "pip", "install", "--quiet", *([] if torch else ["--pre"]), *given)
    return interpreter


def tried(interpreter: Path, arguments: list[str]) -> tuple[str, int]:
    """A row of the table, and pytest's exit status."""
    began = time.monotonic()
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # uv compiles nothing: each process would compile torch
    asked = [str(interpreter), "-c", VERSIONS]
    named = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout
    command = [str(interpreter), "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider"]
    done = subprocess.Popen(
        [*command, "-m", "core", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    last = ""
    for line in done.stdout or ():
        sys.stdout.write(line)
        last = line.strip() or last
    status = done.wait()
    said = re.sub(r" in [\d.]+s.*", "", last.strip("= "))
    return f"{named}| {said} | {time.monotonic() - began:.0f} s |", status


def main() -> int:
    """Try every version that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="of torch, such as 2.11.0")
    parser.add_argument("--pre", action="store_true", help="the newest pre-release too")
    parser.add_argument("--python", default="{}.{}".format(*sys.version_info), help="version of Python, such as 3.13")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the environments in this folder")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="all that follows goes to pytest")
    given = parser.parse_args()
    versions: list[str | None] = [*given.versions, *([None] if given.pre else [])]
    if not versions:
        parser.error("no version of torch was given; name one or more, or pass --pre")
    rows, worst = [], 0
    for version in versions:
        folder = (
            Path(tempfile.mkdtemp(prefix="noesis-torch-")) if given.keep is None else given.keep / (version or "pre")
        )
        try:
            row, status = tried(install(folder, version, given.python), given.pytest)
        finally:
            if given.keep is None:
                shutil.rmtree(folder, ignore_errors=True)
        rows.append(row)
        worst = max(worst, status)
    print("\n| torch | triton | Python | NumPy | tests | time |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    return worst


if __name__ == "__main__":
    sys.exit(main())
