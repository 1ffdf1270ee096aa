"""Edits as files: which edits there are is data, listed, saved and checked like any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..errors import BadType
from ..results import Saved
from ..text import table
from .edits import Add, Edit, Noise, Project, Scale, When, Zero
from .ordering import in_order
from .replacements import Freeze, Mean, Patch, Replacement, Resample

_KINDS: dict[str, type[Edit]] = {
    kind.__name__: kind for kind in (Add, Freeze, Mean, Noise, Patch, Project, Resample, Scale, Zero)
}


class Edits(Sequence[Edit], Saved):
    """A list of edits that can be saved.

    Examples:
        >>> from noesis import interp
        >>> edits = interp.Edits([interp.Zero("z.1.2", steps="decode"), interp.Scale("mlp.0", 0.5)])
        >>> print(edits)
        2 edits
        edit           site
        Zero z.1.2    z.1.2  steps='decode'
        Scale mlp.0   mlp.0  factor=0.5
        >>> interp.Edits.from_json(edits.to_json()) == edits
        True

    Args:
        edits: whichever, but `Custom` and a `when` that is a function cannot be saved.

    Raises:
        NoesisError: (a ValueError or TypeError) for edits that cannot go together, or are none.
    """

    kind = "edits"

    def __init__(self, edits: Iterable[Edit]) -> None:
        self._edits = in_order(tuple(edits))

    @overload
    def __getitem__(self, index: int) -> Edit: ...
    @overload
    def __getitem__(self, index: slice) -> Edits: ...
    def __getitem__(self, index: int | slice) -> Edit | Edits:
        """One of them, in the order in which they are applied, or several."""
        edits = list(self._edits.values())
        return Edits(edits[index]) if isinstance(index, slice) else edits[index]

    def __len__(self) -> int:
        return len(self._edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits.values())

    def __eq__(self, other: object) -> bool:
        """Whether the other has the same edits, bit for bit."""
        return isinstance(other, Edits) and self._described() == other._described()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        rows = []
        for name, edit in self._edits.items():
            given = {**_numbers(edit), **{key: tuple(value.shape) for key, value in _tensors(edit).items()}}
            rows.append([name, edit.site, ", ".join(f"{key}={value!r}" for key, value in given.items())])
        return f"{len(self)} edit{'' if len(self) == 1 else 's'}\n{table(['edit', 'site', ''], rows)}"

    # ------------------------------------------------------------ files

    def _described(self) -> list[tuple[Any, ...]]:
        return [
            (edit.kind, edit.site, _numbers(edit), {name: value.tolist() for name, value in _tensors(edit).items()})
            for edit in self
        ]

    def _header(self) -> dict[str, Any]:
        edits = []
        for name, edit in self._edits.items():
            if edit.kind not in _KINDS:
                raise BadType(f"{name} is a {edit.kind}", "edits that are data", "Leave it out: a function is no data")
            if edit.when is not None and not isinstance(edit.when, When):
                raise BadType(
                    f"the `when` of {name} is a function", "a When, which is data", "Write When('norm', '>', 3)"
                )
            edits.append({"kind": edit.kind, "site": edit.site, **_numbers(edit)})
        return {"edits": edits}

    def _arrays(self) -> files.Arrays:
        return {f"{number}/{name}": value for number, edit in enumerate(self) for name, value in _tensors(edit).items()}

    def _payload(self) -> dict[str, Any]:
        tensors = {
            name: {"dtype": str(value.dtype), "shape": list(value.shape), "values": value.flatten().tolist()}
            for name, value in self._arrays().items()
        }
        return {**self._header(), "tensors": tensors}

    @classmethod
    def _from_payload(cls, payload: dict[str, Any]) -> Edits:
        arrays = {
            name: np.asarray(given["values"], dtype=_dtype(given["dtype"])).reshape(given["shape"])
            for name, given in payload["tensors"].items()
        }
        return cls._from_arrays(arrays, payload)

    @classmethod
    def _from_arrays(cls, arrays: files.Arrays, header: dict[str, Any]) -> Edits:
        own: list[dict[str, Any]] = [{} for _ in header["edits"]]
        for name, value in arrays.items():
            number, _, rest = name.partition("/")
            own[int(number)][rest] = torch.from_numpy(np.array(value))
        return cls([_edit(given, tensors) for given, tensors in zip(header["edits"], own, strict=True)])


def _dtype(name: str) -> Any:
    if name not in ("float32", "float64"):
        raise ValueError(f"a tensor of dtype {name}")
    return np.dtype(name)


def _numbers(edit: Edit) -> dict[str, Any]:
    """What of an edit is not its default, tensors aside."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(edit):
        value = getattr(edit, field.name)
        if field.name in ("site", "reference", "direction", "function") or value in (None, "", ()):
            continue
        found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def _tensors(edit: Edit) -> dict[str, Any]:
    """Its tensors, in a dtype that holds each of their numbers."""
    found: dict[str, Tensor] = {}
    if isinstance(edit, (Add, Project)):
        found["direction"] = edit.direction
    if isinstance(edit, Replacement):
        assert isinstance(edit.reference, dict)
        for site, calls in edit.reference.items():
            found.update({f"reference/{number}/{site}": value for number, value in enumerate(calls)})
    return {
        name: value.cpu().to(torch.promote_types(value.dtype, torch.float32)).numpy() for name, value in found.items()
    }


def _edit(given: dict[str, Any], tensors: dict[str, Tensor]) -> Edit:
    kind = _KINDS[given["kind"]]
    values = {name: value for name, value in given.items() if name != "kind"}
    if isinstance(values.get("when"), list):
        values["when"] = When(*values["when"])
    if "direction" in tensors:
        values["direction"] = tensors["direction"]
    calls: dict[str, dict[int, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("reference/"):
            _, number, site = name.split("/", 2)
            calls.setdefault(site, {})[int(number)] = value
    if calls:
        values["reference"] = {site: [numbered[n] for n in range(len(numbered))] for site, numbered in calls.items()}
    return kind(**values)
