"""Codebooks and calibration as one file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import files
from ..errors import BadFile, BadValue, WrongState
from .calibration import DEPENDS, MASKED, OTHERS, UNTOUCHED, Calibration, Doubt, ReferenceScores
from .codebook import Codebook
from .layer_codebook import LayerCodebook
from .scorer import Scorer

KIND, CODES = "calibration", "codebooks"
#: What is written of each layer's codebook.
PARTS = ("projection", "codes", "centre", "whiten", "log_weights", "constant", "residual", "norm", "counts")
SETTINGS = ("size", "dim", "positions", "most_positions", "mask")


def save_calibration(scorer: Scorer, path: files.PathLike) -> Path:
    """Write what `calibrate` learned, with the layers and widths it belongs to."""
    return files.save_tensors(path, KIND, *written_calibration(scorer))


def written_calibration(scorer: Scorer) -> tuple[files.Arrays, dict[str, Any]]:
    """The arrays and the header of a calibration's file."""
    calibration = scorer.calibration
    if calibration is None:
        raise WrongState("There is no calibration to save", "a calibrated model", "Call wrapped.calibrate(loader)")
    arrays: files.Arrays = {"scores": calibration.scores}
    for index, name in enumerate(calibration.layers):
        for part, array in scorer.books[name].arrays().items():
            arrays[f"{index}.{part}"] = array
        arrays.update(_of_reference(f"{index}.ranks", calibration.references[name]))
    if calibration.doubt is not None:
        arrays.update(_of_reference("unsure", calibration.doubt.unsure))
        arrays.update(_of_reference("sure", calibration.doubt.sure))
    for label, scores in (calibration.classes or {}).items():
        arrays[f"class.{label}"] = scores
    header: dict[str, Any] = {
        "layers": calibration.layers,
        "counted": calibration.counted,
        "padding": calibration.padding,
        "samples": list(calibration.samples),
        "logits": calibration.doubt is not None,
        "classes": None if calibration.classes is None else sorted(calibration.classes),
        "settings": {name: getattr(scorer.settings, name) for name in SETTINGS},
    }
    return arrays, header


def pack_codes(scorer: Scorer) -> dict[str, bytes]:
    """The bytes of a calibration's file; where codebooks only learned, theirs alone; or nothing."""
    if scorer.calibration is not None:
        return {KIND: files.pack_tensors(KIND, *written_calibration(scorer))}
    ready = {name: book for name, book in scorer.books.items() if book.ready}
    if not ready:
        return {}
    parts = enumerate(ready.values())
    arrays = {f"{index}.{part}": array for index, book in parts for part, array in book.arrays().items()}
    return {CODES: files.pack_tensors(CODES, arrays, {"layers": list(ready)})}


def unpack_codes(scorer: Scorer, packed: dict[str, bytes], where: str, widths: Mapping[str, int]) -> None:
    """Take what `pack_codes` gave; errors call it `where`.

    Raises:
        NoesisError: when it is broken, or of other layers, widths or settings.
    """
    if KIND in packed:
        _adopt(scorer, *files.parse_tensors(packed[KIND], KIND, where), where, widths)
    if CODES in packed:
        arrays, header = files.parse_tensors(packed[CODES], CODES, where)
        with _broken(where):
            books = {name: _book(scorer, index, name, arrays) for index, name in enumerate(_names(header["layers"]))}
        _check_books(scorer, books, widths)
        scorer.adopt(books, scorer.calibration)


def load_calibration(scorer: Scorer, path: files.PathLike, widths: Mapping[str, int]) -> Calibration:
    """Take what a file holds, if it is of these layers."""
    return _adopt(scorer, *files.load_tensors(path, KIND), path, widths)


def _adopt(
    scorer: Scorer, arrays: files.Arrays, header: dict[str, Any], path: files.PathLike, widths: Mapping[str, int]
) -> Calibration:
    with _broken(path):
        calibration, books = read_calibration(scorer, arrays, header)
    _check_books(scorer, books, widths)
    _check(scorer, calibration, header)
    scorer.adopt(books, calibration)
    return calibration


@contextmanager
def _broken(path: files.PathLike) -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError, OverflowError) as error:
        raise BadFile(f"{path} is broken: {error!r}", "a file that save_calibration wrote", "Calibrate again") from None


def read_calibration(
    scorer: Scorer, arrays: files.Arrays, header: dict[str, Any]
) -> tuple[Calibration, dict[str, LayerCodebook]]:
    """Calibration and codebooks from a file's arrays and header."""
    names, counted = _names(header["layers"]), _names(header["counted"])
    if not set(counted) <= set(names) or not isinstance(header["settings"], dict):
        raise ValueError("layers that count and are not there, or no settings")
    fit, rank, last = (int(number) for number in header["samples"])
    scores = _sorted(arrays["scores"])
    if min(fit, rank) < 1 or last != len(scores):
        raise ValueError(f"{len(scores)} scores of {last} samples")
    books = {name: _book(scorer, index, name, arrays) for index, name in enumerate(names)}
    classes = header["classes"]
    calibration = Calibration(
        names,
        {name: _to_reference(f"{index}.ranks", arrays) for index, name in enumerate(names)},
        Doubt(_to_reference("unsure", arrays), _to_reference("sure", arrays)) if header["logits"] else None,
        (fit, rank, last),
        scores,
        None if classes is None else {int(label): _of_class(int(label), arrays) for label in classes},
        counted,
        _padding(header),
    )
    if classes is not None and OTHERS not in classes:
        raise ValueError("classes without the others")
    return calibration, books


def _book(scorer: Scorer, index: int, name: str, arrays: files.Arrays) -> LayerCodebook:
    book = LayerCodebook(scorer.settings, torch.device("cpu"))
    book.restore(_parts(index, name, arrays))
    return book


def _names(given: Any) -> list[str]:
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise TypeError(f"names {given!r}"[:200])
    if len(set(given)) < len(given):
        raise ValueError("a name twice")
    return list(given)


def _padding(header: dict[str, Any]) -> dict[str, str]:
    given = header.get("padding", {})  # older files have none
    if not isinstance(given, dict) or not all(found in (MASKED, UNTOUCHED, DEPENDS) for found in given.values()):
        raise ValueError(f"padding {given!r}"[:200])
    return {str(name): str(found) for name, found in given.items()}


def _parts(index: int, name: str, arrays: files.Arrays) -> files.Arrays:
    """The arrays of one layer's codebook, once they fit together and give numbers."""
    parts = {part: np.asarray(arrays[f"{index}.{part}"]) for part in PARTS}
    wrong = [part for part, array in parts.items() if array.dtype != np.float32]
    if wrong:
        raise ValueError(f"{wrong[0]} of {name} has dtype {parts[wrong[0]].dtype}")
    channels, dim = parts["projection"].shape
    size = len(parts["codes"])
    for part in ("constant", "residual"):  # written with a dimension, since a file has no arrays without
        parts[part] = parts[part].reshape(())
    shapes = {
        "codes": (size, dim), "centre": (channels,), "whiten": (dim, dim), "log_weights": (size,), "norm": (2,),
        "counts": (size,),
    }  # fmt: skip
    wrong = [part for part, shape in shapes.items() if parts[part].shape != shape]
    if wrong or not size * dim:
        part = wrong[0] if wrong else "codes"
        raise ValueError(f"{part} of {name} has shape {parts[part].shape}")
    # The residual is infinite where the codebook's subspace is all there is.
    wrong = [part for part in PARTS if part != "residual" and not np.isfinite(parts[part]).all()]
    if wrong or not (parts["residual"] > 0 and parts["norm"][1] > 0):
        raise ValueError(f"{wrong[0] if wrong else 'residual or norm'} of {name} holds no numbers that could be")
    return parts


def _check_books(scorer: Scorer, books: dict[str, LayerCodebook], widths: Mapping[str, int]) -> None:
    strange = [name for name in books if name not in scorer.books]
    if strange:
        raise BadValue(
            f"The calibration is of the layer {strange[0]}, which is not observed here",
            f"one of {', '.join(list(scorer.books)[:5])}",
            "Wrap the same layers as when it was saved",
        )
    for name, book in books.items():
        if name in widths:
            book.check(name, widths[name])
        own = scorer.books[name]
        if scorer.handed_out and scorer.learned() and own.ready and own.codes.shape != book.codes.shape:
            raise BadValue(
                f"There are codes {list(book.codes.shape)} for {name}, and an optimiser may hold "
                f"{list(own.codes.shape)}, since codebook_parameters() gave them away",
                "codes of the same size",
                "Load into a new wrap, before its first batch, and make the optimiser after that",
            )


def _check(scorer: Scorer, calibration: Calibration, header: dict[str, Any]) -> None:
    if (calibration.doubt is None) == scorer.logits:
        said = "without logits" if calibration.doubt is None else "with logits"
        raise BadValue(f"The calibration was made {said}", "the same here", "Wrap with the same logits= as then")
    given = {"most_positions": Codebook.most_positions} | header["settings"]  # older files have none
    compared = ("positions", "mask", *(["most_positions"] if scorer.settings.positions == "each" else []))
    differs = [name for name in compared if given.get(name) != getattr(scorer.settings, name)]
    if differs:
        name = differs[0]
        raise BadValue(
            f"The calibration was made with Codebook({name}={given.get(name)!r})",
            f"{name}={getattr(scorer.settings, name)!r}, as here",
            "Wrap with the same codebook as then",
        )


def _of_reference(prefix: str, reference: ReferenceScores) -> files.Arrays:
    tail = np.array([reference.start, reference.share, reference.scale, *reference.usual])
    return {f"{prefix}.scores": reference.scores, f"{prefix}.tail": tail}


def _to_reference(prefix: str, arrays: files.Arrays) -> ReferenceScores:
    start, share, scale, mixture, residual, norm = (float(value) for value in arrays[f"{prefix}.tail"])
    usual = (mixture, residual, norm)
    if not (0 < share <= 1 and 0 < scale < np.inf and np.isfinite(start)) or np.isnan(usual).any():
        raise ValueError(f"a tail of {share} with scale {scale} from {start}")
    return ReferenceScores(_sorted(arrays[f"{prefix}.scores"]), start, share, scale, usual)


def _of_class(label: int, arrays: files.Arrays) -> Any:
    scores = arrays[f"class.{label}"]
    return np.zeros(0) if label == OTHERS and scores.shape == (0,) else _sorted(scores)  # none where all have enough


def _sorted(scores: Any) -> Any:
    array = np.asarray(scores, np.float64)
    if array.ndim != 1 or not len(array) or (array[1:] < array[:-1]).any() or np.isnan(array).any():
        raise ValueError("scores that are not in order")
    return array
