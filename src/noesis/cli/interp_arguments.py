"""Arguments of `noesis interp`: looking inside a language model."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import add_command, add_force, add_json, add_model, seed


def add_interp(commands: Any) -> None:
    """`noesis interp`, with a command of its own for each thing to look at."""
    about = "Look inside a language model: what it is made of, and which part of it causes what it says."
    parser = add_command(commands, "interp", about)
    below = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_anatomy, _lens, _heads, _patch, _circuit):
        add(below)


def _interp_command(commands: Any, name: str, about: str) -> argparse.ArgumentParser:
    parser = add_command(commands, name, about)
    parser.set_defaults(command=f"interp {name}", plot=None, out=None)
    add_model(parser)
    return parser


def _anatomy(commands: Any) -> None:
    parser = _interp_command(commands, "anatomy", "What a model is made of, verified by one run.")
    _add_prompts(parser, required=True)
    add_json(parser)


def _lens(commands: Any) -> None:
    parser = _interp_command(commands, "lens", "What the model would say if it ended after each layer: the logit lens.")
    _add_prompts(parser, required=True)
    parser.add_argument(
        "--tokens", nargs="+", default=[], metavar="TOKEN", help="whose rank to follow, such as ' Mary'"
    )
    _add_written(parser, "draw the KL to the final distribution, of the first prompt")
    add_json(parser)


def _heads(commands: Any) -> None:
    about = "What each attention head looks at: previous tokens, copies, what followed copies; beside its controls."
    parser = _interp_command(commands, "heads", about)
    _add_prompts(parser, required=False, default=" (default: random tokens)")
    parser.add_argument(
        "--kind",
        default="induction",
        choices=("previous", "duplicate", "induction", "first", "entropy", "copying"),
        help="what --plot draws (default: %(default)s)",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of random tokens and weights (default: 0)")
    _add_written(parser, "draw the scores of one kind, layers by heads")
    add_json(parser)


def _patch(commands: Any) -> None:
    about = "Which part of a model an answer goes through: activation patching of pairs of prompts."
    parser = _interp_command(commands, "patch", about)
    _add_pairs(parser)
    parser.add_argument(
        "--sites",
        nargs="+",
        default=["resid_post"],
        metavar="SITE",
        help="where to patch: resid_post (default), attn, mlp, z (heads), z.3.2, ...; or a module's dotted name",
    )
    parser.add_argument(
        "--positions", nargs="+", default=["each"], metavar="N", help="each (default), all (together), or numbers"
    )
    parser.add_argument(
        "--direction",
        default="denoise",
        choices=("denoise", "noise"),
        help="put clean into corrupted (denoise, default), or corrupted into clean",
    )
    _add_written(parser, "draw the mean effects")
    add_json(parser)


def _circuit(commands: Any) -> None:
    about = "The circuit that carries an answer: found on one half of the pairs, and reported on the other."
    parser = _interp_command(commands, "circuit", about)
    _add_pairs(parser)
    parser.add_argument(
        "--method",
        default="exact",
        choices=("exact", "acdc"),
        help="score each part alone (default), or take them out one after the other, in small models",
    )
    parser.add_argument("--size", type=float, metavar="N", help="how many parts, or below 1 which share of them")
    parser.add_argument(
        "--faithfulness",
        type=float,
        default=0.8,
        metavar="F",
        help="or the fewest that are as faithful (default: %(default)s)",
    )
    parser.add_argument(
        "--ablation",
        default="resample",
        choices=("resample", "mean", "zero"),
        help="what is outside of the circuit (default: %(default)s)",
    )
    parser.add_argument(
        "--level", default="edges", choices=("edges", "nodes"), help="what it is made of (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the halves (default: 0)")
    _add_written(parser, "draw it, with its faithfulness by size")
    add_json(parser)


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    each = "a text, or a file of one a line"
    parser.add_argument("--clean", required=True, metavar="TEXT|FILE", help=f"{each}: prompts with the right answer")
    parser.add_argument(
        "--corrupted",
        required=True,
        metavar="TEXT|FILE",
        help="likewise, of as many tokens each, with the wrong answer",
    )
    for name in ("right", "wrong"):
        parser.add_argument(
            f"--{name}", required=True, metavar="TOKEN|FILE", help="one token, or a file of one for each pair"
        )


def _add_prompts(parser: argparse.ArgumentParser, required: bool, default: str = "") -> None:
    prompts = parser.add_mutually_exclusive_group(required=required)
    prompts.add_argument("--prompt", metavar="TEXT", help=f"what the model reads{default}")
    prompts.add_argument("--prompts", metavar="FILE", help="likewise, one a line")


def _add_written(parser: argparse.ArgumentParser, drawing: str) -> None:
    parser.add_argument("--out", metavar="FILE", help="write it to .safetensors, .json or .json.gz")
    parser.add_argument("--plot", metavar="FILE", help=drawing)
    add_force(parser)
