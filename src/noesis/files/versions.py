"""The version of each kind of file: what is written, and what is still read."""

from __future__ import annotations

from typing import Any

from ..errors import BadFile
from .atomic import PathLike

#: What is written today. Of each kind all versions from 1 are read; what an older one lacks, its reader knows. A new
#: field that readers may do without changes no version.
VERSIONS = {
    "activations": 1,
    "attribution": 1,
    "calibration": 1,
    "circuit": 1,
    "codebooks": 1,
    "coder_quality": 1,
    "comparison": 1,
    "contributions": 1,
    "direction": 1,
    "drift_monitor": 1,
    "edits": 1,
    "edges": 1,
    "effects": 1,
    "fidelity": 1,
    "lens": 1,
    "head_scores": 1,
    "importance": 1,
    "model_diff": 1,
    "neurons": 1,
    "parameter_norms": 1,
    "probe": 1,
    "routes": 1,
    "run_state": 1,
    "snapshot": 1,
    "soulprint": 1,
    "surprise": 1,
    "token_deltas": 1,
    "trace": 1,
    "tuned_lens": 1,
}


def heading(kind: str) -> dict[str, Any]:
    """How every header begins."""
    return {"format": f"noesis.{kind}", "format_version": VERSIONS[kind]}


def check_header(header: Any, kind: str, path: PathLike) -> dict[str, Any]:
    """The header, once its format and version are among those that are read."""
    given = header.get("format") if isinstance(header, dict) else None
    if given != f"noesis.{kind}":
        raise BadFile(
            f"{path} is no noesis {kind}: its format is {given!r}",
            f"format 'noesis.{kind}'",
            f"Pass a file written by {kind.title().replace('_', '')}.save",
        )
    version, newest = header.get("format_version"), VERSIONS[kind]
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= newest:
        raise BadFile(
            f"{path} has format_version {version!r}",
            f"version {newest}" if newest == 1 else f"a version from 1 to {newest}",
            "Upgrade noesis, or write the file again with this version",
        )
    return dict(header)
