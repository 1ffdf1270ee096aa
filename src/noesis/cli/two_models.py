"""What `noesis diff` compares: two models, made one after the other, or captures; and the inputs of both."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..diffing import diff
from ..errors import BadFile, BadValue, MissingFile
from ..results import Activations, ModelDiff
from . import models
from .prompts import texts_of

#: Files of inputs; any other is text, a prompt a line.
TENSORS = (".npz", ".pt", ".safetensors")


def diff_of(args: Namespace) -> ModelDiff:
    """What differs between the models of a command line: no two are there at a time.

    Args:
        args: as `noesis diff` parses them.

    Raises:
        NoesisError: when a model or an input cannot be read, or they do not fit together.
    """
    device = models.device_of(args.device)
    paths = args.model_a, args.model_b
    captures = [_captures(path) for path in paths]
    if args.prompts is None and not all(captures):
        raise BadValue("--prompts is not given", "a text or a file of inputs", "Leave it out for saved captures alone")
    inputs = None if args.prompts is None else inputs_of(args.prompts)
    pipelines = [not saved and models.kind_of(path) == "pipeline" for path, saved in zip(paths, captures, strict=True)]
    if args.steps is not None and not any(pipelines):
        raise BadValue("--steps is given, and neither model is a pipeline", "options that fit", "Leave out --steps")
    if any(pipelines):
        inputs = [_of_pipeline(given, args.steps) for given in inputs or []]
    return diff(
        captures[0] or partial(_make, args.model_a, device, args.dtype_a, None),
        captures[1] or partial(_make, args.model_b, device, args.dtype_b, args.adapter_b),
        inputs,
        layers=args.layers,
        baseline=args.baseline,
        match="order" if args.match_order else "name",
        seed=args.seed,
    )


def inputs_of(given: list[str]) -> list[Any]:
    """Texts, and what is in files: of `.npz`, `.pt` and `.safetensors` the rows of tensors, of others the lines.

    One tensor in a file is what the model is called with; several are keywords of that call.

    Examples:
        >>> from noesis.cli.two_models import inputs_of
        >>> inputs_of(["Once upon a time", "Tom was happy"])
        ['Once upon a time', 'Tom was happy']
    """
    found: list[Any] = []
    for text in given:
        path = Path(text)
        if text.endswith(TENSORS) and not path.is_file():
            raise MissingFile(f"{text} is not there", "a file of inputs, or a text", "Check the path")
        found += _rows(path) if text.endswith(TENSORS) else texts_of(text)
    if not found:
        raise BadValue("--prompts holds no input", "at least one, better 8", "Write some")
    return found


def _make(path: str, device: str, dtype: str, adapter: str | None) -> Any:
    if models.kind_of(path) == "pipeline":
        return models.load_pipeline(path, device, dtype, adapter)
    return models.load_model(path, device, dtype, adapter)


def _captures(path: str) -> list[Activations]:
    """The captures in a file, or in the files of a folder in the order of their names; none for a model."""
    given = Path(path)
    if given.is_file():
        return [Activations.load(given)]
    if not given.is_dir() or (given / "config.json").is_file() or (given / "model_index.json").is_file():
        return []
    return [Activations.load(each) for each in sorted(given.glob("*.safetensors"))]


def _of_pipeline(given: Any, steps: int | None) -> dict[str, Any]:
    options = {"prompt": given} if isinstance(given, str) else dict(given)
    return options if steps is None else {**options, "num_inference_steps": steps}


def _rows(path: Path) -> list[Any]:
    named = _tensors(path)
    counts = {name: len(tensor) for name, tensor in named.items() if tensor.dim()}
    if len(counts) != len(named) or len(set(counts.values())) != 1:
        raise BadFile(
            f"{path} holds {', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in named.items()) or 'nothing'}",
            "tensors [inputs, ...], as many rows in each",
            "Save one tensor, or keywords of the model's forward",
        )
    if len(named) == 1:
        return list(next(iter(named.values())).split(1))
    parts = {name: tensor.split(1) for name, tensor in named.items()}
    return [{name: rows[at] for name, rows in parts.items()} for at in range(next(iter(counts.values())))]


def _tensors(path: Path) -> dict[str, Tensor]:
    read: dict[str, Callable[[], Any]] = {
        ".npz": lambda: {name: torch.from_numpy(array) for name, array in np.load(path, allow_pickle=False).items()},
        ".pt": lambda: torch.load(path, map_location="cpu", weights_only=True),
        ".safetensors": lambda: safetensors.torch.load_file(path),
    }
    try:
        found = read[path.suffix]()
    except OSError:
        raise
    except Exception as error:
        raise BadFile(f"{path} cannot be read ({error})", "tensors of numbers", "Save it again") from error
    named = {"": found} if isinstance(found, Tensor) else found
    if not isinstance(named, dict) or not all(isinstance(each, Tensor) for each in named.values()):
        raise BadFile(f"{path} holds something else than tensors", "a tensor, or tensors by name", "Save tensors")
    return named
