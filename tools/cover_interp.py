"""Try interp on each architecture that a small configuration makes, and write docs/interp_coverage.md.

Run: python tools/cover_interp.py [NAME ...]

The text models are all classes that transformers lists for causal, masked and sequence-to-sequence language modelling,
their configurations made small by the names of their sizes; the others are those of tests/zoo. Each is tried in a
process of its own, one after the other, with a limit of time and of memory. With names, their rows are printed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "interp_coverage.md"
SECONDS, BYTES, PARAMETERS = 60, 12 << 30, 5_000_000
sys.path[:0] = [str(ROOT / "tests")]

HEAD = """# What interp finds in which models

Each row is a model with random weights, small by its configuration alone: no architecture is known to `noesis.interp`
by name. `python tools/cover_interp.py` writes this page.

| column | what |
|---|---|
| attention | `sdpa`, `eager`: by transformers' interface; `torch sdpa`, `softmax`: by functions of torch |
| heads | of queries / of keys, from the shapes of the run; + those of a second attention |
| sum | blocks in which input + attention + mlp is the output |
| by head | blocks in which the heads' parts add up to what the output projection returns |
| p v = z | blocks whose pattern, from q and k, gives what attention gave |
| logits | whether the logits are the unembedding of the normed last block; no: capped or scaled |
| resumed | blocks at which a forward can be taken up, bit for bit |
| equal | whether outputs with everything kept that works are those of the bare model, bit for bit |

"""
COLUMNS = "| model | blocks | attention | heads | sum | by head | p v = z | logits | resumed | equal | refused |\n"
RULE = "|---|---|---|---|---|---|---|---|---|---|---|\n"

#: Sizes by the names that configurations have for them; a configuration is given those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size", "encoder_vocab_size", "decoder_vocab_size"), 99),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "word_embed_proj_dim", "embedding_size"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "encoder_ffn_dim", "d_inner"), 40
    ),
    **dict.fromkeys(("decoder_ffn_dim", "ffn_hidden_size", "feed_forward_proj_dim", "dense_ffn_hidden_size"), 40),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_block_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "d_head", "kv_channels", "attention_head_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "num_selected_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "sliding_window": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "time_step_rank": 4,
    "chunk_size": 4,
    "mamba_chunk_size": 4,
    "sep_token_id": 3,
    "cls_token_id": 1,
    "mask_token_id": 4,
    "rotary_dim": 4,
    "qk_head_dim": 8,
}
#: What some need beside; tried in turn.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": None},
    {"layer_types": ["full_attention", "full_attention"]},
    {"layer_types": None},
    {"q_lora_rank": None, "num_key_value_heads": 4},
    {"num_hidden_layers": 4, "layer_types": None},
)
KINDS = {
    "causal language models": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence to sequence": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked language models": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}


def text_models() -> dict[str, list[str]]:
    """Classes of transformers by what they are for, each once."""
    from transformers.models.auto import modeling_auto

    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for kind, mapping in KINDS.items():
        named = [name if isinstance(name, str) else name[0] for name in getattr(modeling_auto, mapping).values()]
        found[kind] = [name for name in dict.fromkeys(named) if name not in seen]
        seen.update(named)
    return found


def zoo_models() -> dict[str, list[str]]:
    """Models of the zoo that are no language models, by their kind."""
    from zoo import models

    wanted = ("vision", "audio", "multimodal", "denoiser", "torch.nn")
    found: dict[str, list[str]] = {}
    for name in models.installed():
        kind = models.ALL[name].kind
        if kind.startswith(wanted) and models.ALL[name].differentiable is not None:
            found.setdefault(kind, []).append(name)
    return found


def small(config_class: Any, variant: dict[str, Any]) -> Any:
    """A configuration with the sizes that it has a name for."""
    try:
        known = set(config_class().to_dict())
    except Exception:  # one that has no defaults
        known = set(SIZES)
    given = {name: value for name, value in {**SIZES, **variant}.items() if name in known and (name in SIZES or value)}
    return config_class(**{name: value for name, value in given.items() if value is not None})


def text_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model of transformers, and inputs on which it runs.

    Raises:
        ValueError: when no variant of the sizes makes one, with the last reason.
    """
    import transformers

    cls = getattr(transformers, name)
    whys = []
    for variant in VARIANTS:
        try:
            return _small_model(cls, variant)
        except Exception as error:  # noqa: PERF203  of any kind: of a stranger's constructor or forward
            whys.append(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    raise ValueError(whys[0])


def _small_model(cls: Any, variant: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    config = small(cls.config_class, variant)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls(config).parameters())
    if count > PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters are left")
    torch.manual_seed(0)
    model = cls(config).eval().float()
    return model, _inputs_of(model)


def _inputs_of(model: nn.Module) -> dict[str, Any]:
    ids = torch.randint(5, 99, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    decoder = {"decoder_input_ids": ids[:, :5]} if getattr(model.config, "is_encoder_decoder", False) else {}
    given = {"input_ids": ids, "attention_mask": mask, **decoder}
    with torch.no_grad():
        try:
            model(**given)
        except Exception:
            del given["attention_mask"]
            model(**given)
    return given


def zoo_model(name: str) -> tuple[nn.Module, Any]:
    """A model of the zoo and its inputs."""
    from zoo import models

    entry = models.ALL[name]
    return models.model_of(entry), entry.inputs()


# ---------------------------------------------------------------- one of them


def cells(model: nn.Module, given: Any) -> list[str]:
    """What interp finds in a model, as the cells of its row."""
    from noesis import interp
    from noesis.interp.attention import PATTERN
    from noesis.interp.identifying import BLOCK, HEADS
    from noesis.interp.sites import CROSS, LAYERED

    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    torch.manual_seed(0)
    with torch.no_grad():
        bare = numbers_of(model(*args, **kwargs))
    found = interp.anatomy(model, *args, **kwargs)
    blocks = found.blocks
    cores = [core for block in blocks for core in (block, block.cross) if core is not None and core.heads]
    heads = dict.fromkeys(f"{'+' * (core in [b.cross for b in blocks])}{core.heads}/{core.kv_heads}" for core in cores)
    keep = [
        f"{site}.{layer}"
        for layer, block in enumerate(blocks)
        for site in (*LAYERED, *(CROSS if block.cross is not None else ()))
        if site not in block.refused
    ]
    keep += [site for site in ("embed", "logits") if site not in found.refused]
    torch.manual_seed(0)
    run = interp.run(model, given, keep=keep, anatomy=found)
    return [
        str(len(blocks)),
        ", ".join(dict.fromkeys(core.implementation for core in cores)) or "-",
        ", ".join(heads) or "-",
        *(_share(blocks, identity) for identity in (BLOCK, HEADS, PATTERN)),
        "-" if not found.checks else "yes" if all(check.holds for check in found.checks) else "no",
        _resumed(model, given, found),
        "yes" if torch.equal(bare, numbers_of(run.output)) else "within rounding" if _near(bare, run.output) else "no",
        _refusals(found),
    ]


def _share(blocks: list[Any], identity: str) -> str:
    both = [check for block in blocks for check in block.checks if check.identity in (identity, f"cross_{identity}")]
    there = [block for block in blocks if any(check.holds for check in both if check in block.checks)]
    return f"{len(there)}/{len(blocks)}"


def _near(bare: Tensor, output: Any) -> bool:
    return torch.allclose(bare, numbers_of(output), atol=1e-5, rtol=1e-4, equal_nan=True)


def _resumed(model: nn.Module, given: Any, found: Any) -> str:
    from noesis.errors import NoesisError
    from noesis.interp.replaying import Replay

    torch.manual_seed(0)
    try:
        replay = Replay(model, given, anatomy=found)
    except NoesisError as error:
        return f"none: {str(error).splitlines()[0].split(';')[0][:60]}"
    good = 0
    for layer, resid in replay.residuals.items():
        torch.manual_seed(0)
        with contextlib.suppress(Exception):  # what it is of is counted
            good += torch.equal(numbers_of(replay.from_block(layer, resid)), numbers_of(replay.output))
    return f"{good}/{len(found.blocks)}"


def _refusals(found: Any) -> str:
    from noesis.interp.anatomy import _grouped

    said: dict[str, list[str]] = {}
    for what, why in _grouped(found):
        said.setdefault(why.split(":")[0], []).append(what.partition(" of ")[0])
    return (
        "; ".join(f"{', '.join(dict.fromkeys(', '.join(what).split(', ')))}: {why}" for why, what in said.items())
        or "-"
    )


def numbers_of(output: Any) -> Tensor:
    """The tensor of a model's output that is compared."""
    from noesis.interp.anatomy import logits_of
    from noesis.layers import hidden_state

    found = logits_of(output)
    found = hidden_state(output) if found is None else found
    if found is None:
        raise ValueError("no floating tensor in what the model returns")
    return found.clone()


def row(name: str, cells: list[str]) -> str:
    """A line of the table."""
    escaped = [cell.replace("|", "/").replace("\n", " ") for cell in cells]
    return f"| `{name}` | {' | '.join(escaped)} |"


# ---------------------------------------------------------------- each in a process of its own


def tried(name: str, make: Callable[[str], tuple[nn.Module, Any]]) -> str:
    """The row of a model, made in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_try, args=(name, make, there))
    process.start()
    there.close()
    try:
        line = here.recv() if here.poll(SECONDS) else None
    except EOFError:
        line = None
    if line is None:
        process.kill()
        line = row(name, [*["-"] * 9, f"not tried: it took more than {SECONDS} s, or more than {BYTES >> 30} GiB"])
    process.join()
    return str(line)


def _try(name: str, make: Callable[[str], tuple[nn.Module, Any]], pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    pipe.send(made(name, make))


def made(name: str, make: Callable[[str], tuple[nn.Module, Any]]) -> str:
    """The row of a model, made here."""
    torch.set_num_threads(1)
    try:
        model, given = make(name)
    except Exception as error:
        return row(name, [*["-"] * 9, f"not built: {str(error)[:160]}"])
    try:
        return row(name, cells(model, given))
    except Exception as error:
        return row(
            name, [*["-"] * 9, f"refused as a whole: {type(error).__name__}: {str(error).splitlines()[0][:160]}"]
        )


def sections() -> Iterator[tuple[str, list[str], Callable[[str], tuple[nn.Module, Any]]]]:
    """Kind, names, and what makes one."""
    for kind, names in text_models().items():
        yield kind, names, text_model
    for kind, names in zoo_models().items():
        yield kind, names, zoo_model


def main() -> None:
    """Write the page, or print the rows of some."""
    from loguru import logger

    logger.disable("noesis")
    wanted, parts = sys.argv[1:], []
    for kind, names, make in sections():
        rows = []
        made(names[0], make)  # what this imports, no process has to import again
        for name in names if not wanted else [name for name in names if name in wanted]:
            rows.append(tried(name, make))
            print(rows[-1], flush=True)
        tested = [line for line in rows if "| not built:" not in line and "| not tried:" not in line]
        absent = [line for line in rows if line not in tested]
        left = (
            ["\nNot made small by the names of sizes alone:\n", *(_listed(line) for line in absent)] if absent else []
        )
        parts.append(
            "\n".join([f"## {kind[0].upper()}{kind[1:]}: {len(tested)}\n", COLUMNS + RULE + "\n".join(tested), *left])
        )
    if not wanted:
        PAGE.write_text(HEAD + "\n\n".join(parts) + "\n", encoding="utf-8")


def _listed(line: str) -> str:
    name, *_, why = (cell.strip() for cell in line.strip("|").split("|"))
    return f"- {name}: {why}"


if __name__ == "__main__":
    main()
