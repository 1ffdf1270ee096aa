"""From a path or an id to the thing: models to run, and runs that were saved.

A folder is read where it lies and never asks the network; only an id of the hub does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

from .. import files
from ..errors import BadFile, BadValue, MissingFile, NoesisError, require

Kind = Literal["pipeline", "language model"]

DTYPES = ("float32", "float16", "bfloat16")
_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")


# ---------------------------------------------------------------- models


def kind_of(model: str) -> Kind:
    """Whether a folder or an id holds a diffusers pipeline or a language model, told by its files.

    Raises:
        NoesisError: when it is neither, or cannot be found.

    Examples:
        >>> import pathlib, tempfile
        >>> from noesis.cli.models import kind_of
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "config.json").write_text('{"model_type": "llama"}')
        ...     kind_of(folder)
        'language model'
    """
    folder = _folder(model)
    if folder is None:
        return _kind_on_hub(model)
    if (folder / "model_index.json").is_file():
        return "pipeline"
    if not (folder / "config.json").is_file():
        raise MissingFile(
            f"{model} holds no model",
            "model_index.json (a diffusers pipeline) or config.json (a language model)",
            "Pass the folder that save_pretrained wrote",
        )
    named = files.read_json(folder / "config.json").get("_class_name")
    if named is not None:
        raise BadValue(
            f"{model} holds a {named}, a part of a pipeline",
            "a whole diffusers pipeline or a language model",
            "Pass the folder above it, with model_index.json",
        )
    return "language model"


def device_of(name: str) -> str:
    """The device a name means; "auto" is the accelerator there is, else the CPU.

    Examples:
        >>> from noesis.cli.models import device_of
        >>> device_of("cpu")
        'cpu'
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise BadValue(f"device={name!r}", "auto, cpu, cuda, cuda:1, mps or another of torch's", "Use auto") from None
    if (kind == "cuda" and not cuda) or (kind == "mps" and not mps):
        raise BadValue(f"device={name!r}, and this torch sees no such device", "a device that is there", "Use auto")
    return name


def load_pipeline(model: str, device: str = "auto", dtype: str = "auto", adapter: str | None = None) -> Any:
    """A diffusers pipeline from a folder or an id, on its device.

    Args:
        model: what `DiffusionPipeline.from_pretrained` takes.
        device: as `device_of` takes it.
        dtype: "float32", "float16", "bfloat16", or "auto" for diffusers' default.
        adapter: what the pipeline's `load_lora_weights` takes.

    Raises:
        NoesisError: when diffusers is not installed or cannot load it.
    """
    diffusers = require("diffusers", extra="diffusers", purpose="A diffusion pipeline")
    where, number = device_of(device), _dtype_of(dtype)
    with _loading(model, "a diffusers pipeline"):
        options = {} if number == "auto" else {_dtype_key(diffusers, (0, 42)): number}
        pipeline = diffusers.DiffusionPipeline.from_pretrained(model, **_local(model), **options).to(where)
    if adapter is not None:
        with _loading(adapter, f"an adapter of {type(pipeline).__name__}"):
            pipeline.load_lora_weights(adapter)
    return pipeline


def load_model(
    model: str, device: str = "auto", dtype: str = "auto", adapter: str | None = None
) -> tuple[nn.Module, Any]:
    """A model of transformers, of the class that its configuration names, and its tokenizer, None where it has none.

    Args:
        model: what `from_pretrained` takes.
        device: as `device_of` takes it.
        dtype: "float32", "float16", "bfloat16", or "auto" for the dtype of the checkpoint.
        adapter: a folder or an id of an adapter of PEFT.

    Raises:
        NoesisError: when transformers or peft is not installed, or cannot load it.
    """
    transformers = require("transformers", extra="transformers", purpose="A model")
    where, number = device_of(device), _dtype_of(dtype)
    with _loading(model, "a model of transformers"):
        config = transformers.AutoConfig.from_pretrained(model, **_local(model))
        named = (config.architectures or [""])[0]
    if not hasattr(transformers, named) or named.endswith("ForCausalLM"):
        loaded, tokenizer = load_language_model(model, device, dtype)
    else:
        with _loading(model, f"a {named}"):
            options = {_dtype_key(transformers, (4, 56)): number}
            loaded = getattr(transformers, named).from_pretrained(model, **_local(model), **options).to(where)
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model, **_local(model))
        except (OSError, ValueError, KeyError, ImportError):  # of models that take no text
            tokenizer = None
    if adapter is not None:
        peft = require("peft", extra="peft", purpose="--adapter-b")
        with _loading(adapter, "an adapter of PEFT"):
            loaded = peft.PeftModel.from_pretrained(loaded, adapter).eval()
    return loaded, tokenizer


def load_language_model(model: str, device: str = "auto", dtype: str = "auto") -> tuple[nn.Module, Any]:
    """A causal language model from a folder or an id, on its device, and its tokenizer.

    Args:
        model: what `AutoModelForCausalLM.from_pretrained` takes.
        device: as `device_of` takes it.
        dtype: "float32", "float16", "bfloat16", or "auto" for the dtype of the checkpoint.

    Raises:
        NoesisError: when transformers is not installed or cannot load it.
    """
    transformers = require("transformers", extra="transformers", purpose="A language model")
    where, number = device_of(device), _dtype_of(dtype)
    with _loading(model, "a causal language model"):
        options = {_dtype_key(transformers, (4, 56)): number}
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, **_local(model))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, **_local(model), **options)
        module: nn.Module = loaded.to(where)
        return module, tokenizer


def without_weights(model: str) -> nn.Module:
    """What `wrap` selects layers in, on the meta device: its modules, not its numbers.

    Args:
        model: a folder or an id of a language model or a diffusers pipeline.

    Returns:
        The language model; or the pipeline's denoiser, several as an `nn.ModuleDict`.

    Raises:
        NoesisError: when its library is not installed or does not know the model.
    """
    if kind_of(model) == "language model":
        transformers = require("transformers", extra="transformers", purpose="A language model")
        with _loading(model, "a causal language model"), torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(model, **_local(model))
            module: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
            return module
    diffusers = require("diffusers", extra="diffusers", purpose="A diffusion pipeline")
    from ..layers import DENOISER
    from ..observing import Pipeline

    with _loading(model, "a diffusers pipeline"):
        index = diffusers.DiffusionPipeline.load_config(model, **_local(model))
        entries = {name: entry for name, entry in index.items() if DENOISER.fullmatch(name) and entry[0]}
        if any(library != "diffusers" or not hasattr(diffusers, kind) for library, kind in entries.values()):
            return Pipeline(load_pipeline(model, "cpu")).denoisers()[0]  # parts of other libraries come with weights
        with torch.device("meta"):
            made = {name: _part(getattr(diffusers, kind), model, name) for name, (_, kind) in entries.items()}
    return Pipeline(SimpleNamespace(components=made)).denoisers()[0]


def _part(kind: Any, model: str, name: str) -> nn.Module:
    module: nn.Module = kind.from_config(kind.load_config(model, subfolder=name, **_local(model)))
    return module


def _folder(model: str) -> Path | None:
    """The folder a model is in; None for what can only be an id of the hub."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise BadValue(f"{model} is a file", "a folder of save_pretrained, or an id", "Pass the folder it is in")
    if not _ID.fullmatch(model):
        raise MissingFile(f"{model} is not there", "a folder of save_pretrained, or an id", "Check the path")
    return None


def _kind_on_hub(model: str) -> Kind:
    require("huggingface_hub", extra="transformers", purpose="A model from the hub")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(model, "model_index.json")
    except LocalEntryNotFoundError:  # no network
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return "language model"
        raise MissingFile(
            f"{model} is no folder here, it is not in the cache, and the hub cannot be reached",
            "a folder of save_pretrained, or an id",
            "Check the path, or the network",
        ) from None
    except EntryNotFoundError:
        return "language model"
    except (OSError, ValueError) as error:
        raise MissingFile(
            f"{model} is neither a folder here nor a model of the hub ({_line(error)})",
            "a folder of save_pretrained, or an id",
            "Check the spelling",
        ) from error
    return "pipeline"


def _local(model: str) -> dict[str, bool]:
    return {"local_files_only": Path(model).is_dir()}


def _dtype_of(name: str) -> Any:
    if name not in ("auto", *DTYPES):
        raise BadValue(f"dtype={name!r}", f"auto or one of {', '.join(DTYPES)}", "Use auto")
    return name if name == "auto" else getattr(torch, name)


def _dtype_key(library: Any, renamed: tuple[int, int]) -> str:
    """What `from_pretrained` calls the dtype: "torch_dtype", before the version that renamed it."""
    major, minor = library.__version__.split(".")[:2]
    return "dtype" if (int(major), int(minor)) >= renamed else "torch_dtype"


@contextmanager
def _loading(model: str, what: str) -> Iterator[None]:
    """Whatever a library raises while it loads is told as one kind of error."""
    try:
        yield
    except NoesisError:
        raise
    except Exception as error:
        raise BadFile(
            f"{model} cannot be loaded as {what} ({type(error).__name__}: {_line(error)})",
            f"{what} that its library can load",
            "Check that all its files are there",
        ) from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
