"""Sparse autoencoders: what a site says in another, sparse basis, and what is lost by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from .. import files
from ..errors import BadFile, BadValue, MissingFile
from .sites import canonical

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
#: What becomes of the codes before they are sparse.
KINDS = ("standard", "topk", "jumprelu")
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")


class SparseCoder:
    """A sparse autoencoder: codes = f((n(x) - b_dec) W_enc + b_enc), x ~ n^-1(codes W_dec + b_dec).

    f is a ReLU (standard; Bricken et al. 2023), a ReLU of the k largest (topk; Gao et al. 2024), or keeps what is
    above a threshold per unit (jumprelu; Rajamanoharan et al. 2024). n scales the input, as its config says; b_dec is
    taken from it only where that is said. All is computed in float32 or the weights' own, if these have more.

    Examples:
        >>> import torch
        >>> from noesis import interp
        >>> coder = interp.SparseCoder(w_enc=torch.eye(3, 6), w_dec=torch.eye(6, 3))
        >>> coder.encode(torch.tensor([[1.0, -2.0, 3.0]]))
        tensor([[1., 0., 3., 0., 0., 0.]])

    Args:
        w_enc: `[width, units]`.
        w_dec: `[units, width]`.
        b_enc: `[units]`; zeros if left out.
        b_dec: `[width]`; likewise.
        kind: "standard", "topk" or "jumprelu".
        k: of topk, how many codes a vector has at most.
        threshold: of jumprelu, `[units]`.
        subtracts: whether b_dec is taken from the input.
        normalisation: "none", "layer_norm" or "constant_norm_rescale".
        flattens: whether the last two dimensions of a site, heads and width, are one here.
        site: where it was trained, if that is known; `"resid_pre.8"`.

    Raises:
        NoesisError: (a ValueError) for weights that do not fit together.
    """

    def __init__(
        self,
        w_enc: Tensor,
        w_dec: Tensor,
        b_enc: Tensor | None = None,
        b_dec: Tensor | None = None,
        *,
        kind: str = "standard",
        k: int | None = None,
        threshold: Tensor | None = None,
        subtracts: bool = False,
        normalisation: str = "none",
        flattens: bool = False,
        site: str | None = None,
    ) -> None:
        dtype = torch.promote_types(w_enc.dtype, torch.float32)
        width, units = w_enc.shape if w_enc.dim() == 2 else (0, 0)
        self.w_enc, self.w_dec = w_enc.detach().to(dtype), w_dec.detach().to(dtype)
        self.b_enc = torch.zeros(units, dtype=dtype) if b_enc is None else b_enc.detach().to(dtype)
        self.b_dec = torch.zeros(width, dtype=dtype) if b_dec is None else b_dec.detach().to(dtype)
        self.threshold = None if threshold is None else threshold.detach().to(dtype)
        self.kind, self.k, self.subtracts = kind, k, subtracts
        self.normalisation, self.flattens, self.site = normalisation, flattens, site
        self._check(width, units)

    def _check(self, width: int, units: int) -> None:
        shapes = {"w_enc": (width, units), "w_dec": (units, width), "b_enc": (units,), "b_dec": (width,)}
        if self.kind == "jumprelu":
            shapes["threshold"] = (units,)
        for name, shape in shapes.items():
            given = getattr(self, name)
            if not width or given is None or tuple(given.shape) != shape:
                had = "nothing" if given is None else f"shape {tuple(given.shape)}"
                raise BadValue(
                    f"{name} has {had}", f"shape {shape}, as w_enc [width, units] says", "Look at the weights"
                )
        if self.kind not in KINDS:
            raise BadValue(
                f"a sparse autoencoder of kind {self.kind!r}", f"one of {', '.join(KINDS)}", "It is not known"
            )
        if self.kind == "topk" and not (type(self.k) is int and 0 < self.k <= units):
            raise BadValue(f"k is {self.k!r}", f"a number from 1 to {units}", "Give how many codes a vector has")
        if self.normalisation not in NORMALISATIONS:
            raise BadValue(
                f"inputs are normalised by {self.normalisation!r}",
                f"one of {', '.join(NORMALISATIONS)}",
                "It is not known",
            )

    @property
    def units(self) -> int:
        """How many units it has."""
        return self.w_enc.shape[1]

    def __repr__(self) -> str:
        where = f" at {self.site}" if self.site else ""
        k = f", k {self.k}" if self.kind == "topk" else ""
        return f"SparseCoder of {self.units} units for width {self.w_enc.shape[0]} ({self.kind}{k}){where}"

    # ------------------------------------------------------------ files

    @classmethod
    def load(cls, path: files.PathLike) -> SparseCoder:
        """Read a folder as SAELens writes it: `cfg.json` and `sae_weights.safetensors`.

        Raises:
            NoesisError: (a ValueError) for what is broken, or a kind that would be computed otherwise, by name;
                (a FileNotFoundError) for what is not there.
        """
        folder = Path(path)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise MissingFile(
                    f"{folder} has no {name}", f"a folder with {CONFIG} and {WEIGHTS}", "Look at the path"
                )
        config = files.read_json(folder / CONFIG)
        data = files.read_bytes(folder / WEIGHTS)
        with files.reading_tensors(folder / WEIGHTS, "sparse autoencoder"):
            weights = safetensors.torch.load(bytes(data))
        options = _options(config, weights, folder)
        missing = {"W_enc", "W_dec"} - set(weights)
        if missing:
            raise BadFile(f"{folder / WEIGHTS} has no {', '.join(sorted(missing))}", "weights of SAELens", "Look at it")
        return cls(weights["W_enc"], weights["W_dec"], weights.get("b_enc"), weights.get("b_dec"), **options)

    # ------------------------------------------------------------ what it says

    def encode(self, x: Tensor) -> Tensor:
        """The codes of what passes the site: `[..., width]` to `[..., units]`."""
        return self._codes(self._normal(self._flat(x))[0])

    def reconstruct(self, x: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """What the codes say of it, if they are changed: of the shape of `x`, in float32 or more."""
        flat = self._flat(x)
        normal, scale, shift = self._normal(flat)
        codes = self._codes(normal)
        codes = codes if change is None else change(codes)
        return ((codes @ self.w_dec.to(x.device) + self.b_dec.to(x.device)) * scale + shift).reshape(x.shape)

    def _flat(self, x: Tensor) -> Tensor:
        flat = x.flatten(-2) if self.flattens and x.dim() > 1 and x.shape[-1] != self.w_enc.shape[0] else x
        if flat.shape[-1] != self.w_enc.shape[0]:
            raise BadValue(
                f"a tensor of shape {tuple(x.shape)} for {self!r}", f"[..., {self.w_enc.shape[0]}]", "Look at its site"
            )
        return flat.to(torch.promote_types(self.w_enc.dtype, flat.dtype))

    def _normal(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """The input as it was trained on, and what undoes that: times scale, plus shift."""
        if self.normalisation == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            scale = (x - shift).std(-1, keepdim=True)
            return (x - shift) / (scale + 1e-5), scale, shift
        if self.normalisation == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
            return x / scale, scale, 0.0
        return x, 1.0, 0.0

    def _codes(self, normal: Tensor) -> Tensor:
        if self.subtracts:
            normal = normal - self.b_dec.to(normal.device)
        before = normal @ self.w_enc.to(normal.device) + self.b_enc.to(normal.device)
        if self.kind == "topk":
            top = before.topk(int(self.k or 0), dim=-1)
            return torch.zeros_like(before).scatter(-1, top.indices, top.values.relu())
        codes = before.relu()
        if self.threshold is not None and self.kind == "jumprelu":
            codes = codes * (before > self.threshold.to(before.device))
        return codes


def _options(config: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """What a config says, as arguments; or why what it says is not computed here."""
    kind = config.get("architecture", "standard")
    given = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if given == "topk":
        kind = "topk"
    refused = [
        (kind not in KINDS, f"architecture {kind!r}", f"one of {', '.join(KINDS)}"),
        (kind != "topk" and given != "relu", f"activation {given!r}", "relu"),
        (bool(config.get("finetuning_scaling_factor")), "a scaling factor of its own from fine-tuning", "none"),
        (config.get("hook_head_index") is not None, f"one head, {config.get('hook_head_index')}", "all heads, or none"),
        (
            bool(config.get("rescale_acts_by_decoder_norm")) and not _unit(weights.get("W_dec")),
            "codes scaled by the norms of its decoder",
            "a decoder of unit norms, as folding gives",
        ),
    ]
    normalisation = config.get("normalize_activations", "none") or "none"
    if normalisation == "expected_average_only_in":
        refused.append(
            (True, "inputs scaled by a constant that is not in its files", "weights with the constant folded in")
        )
    for wrong, what, expected in refused:
        if wrong:
            raise BadValue(f"{folder} has {what}", expected, "It would be computed otherwise than it was trained")
    name = (config.get("metadata") or {}).get("hook_name", config.get("hook_name"))
    return {
        "kind": kind,
        "k": k,
        "threshold": weights.get("threshold"),
        "subtracts": bool(config.get("apply_b_dec_to_input", True)),
        "normalisation": normalisation,
        "flattens": config.get("reshape_activations", config.get("hook_z_reshaping_mode", "none")) == "hook_z"
        or str(name).endswith("hook_z"),
        "site": _site(name),
    }


def _unit(w_dec: Tensor | None) -> bool:
    return w_dec is not None and bool(((w_dec.float().norm(dim=-1) - 1).abs() < 1e-3).all())


def _site(name: Any) -> str | None:
    found = canonical(name) if isinstance(name, str) else None
    return found if found and not found.startswith("module:") else None
