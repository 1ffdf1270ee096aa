"""Arguments that several commands have, and the values that they take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

#: Seeds that torch takes.
LARGEST_SEED = (1 << 64) - 1


def add_command(commands: Any, name: str, about: str, *aliases: str) -> argparse.ArgumentParser:
    """A command, with its own --help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about, aliases=aliases, allow_abbrev=False
    )
    parser.set_defaults(command=name, json=False)
    return parser


def add_model(parser: Any) -> None:
    """Which model, where it runs, and in which numbers."""
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a folder of save_pretrained, or an id")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))


def add_seed(parser: Any) -> None:
    """`--seed`."""
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of noise and drawn tokens (default: 0)")


def add_generation(parser: Any) -> None:
    """How a language model goes on with a prompt."""
    parser.add_argument("--max-new-tokens", type=from_zero, metavar="N", help="tokens to add (default: 32)")
    parser.add_argument("--temperature", type=float, metavar="T", help="draw tokens; by default the likeliest is taken")


def add_layers(parser: Any) -> None:
    """`--layers`."""
    parser.add_argument(
        "--layers",
        nargs="+",
        default="blocks",
        metavar="SELECTOR",
        help="blocks (default), all, linear, attention, a name, a glob, 're:...'; several are joined",
    )


def add_force(parser: Any) -> None:
    """`--force`."""
    parser.add_argument("--force", action="store_true", help="replace files that are there; else that is an error")


def add_json(parser: Any) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


# ---------------------------------------------------------------- values


def _whole(text: str, least: int, most: int) -> int:
    if not (text.isdecimal() and len(text) <= len(str(most)) and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
    return int(text)


def positive(text: str) -> int:
    """A whole number from 1."""
    return _whole(text, 1, 1 << 20)


def from_zero(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0, 1 << 20)


def seed(text: str) -> int:
    """A seed that torch takes."""
    return _whole(text, 0, LARGEST_SEED)


def distance(text: str) -> float:
    """A number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")
    return value


def printed_or_file(text: str) -> bool | Path:
    """True for "-", which stands for stdout; else the file."""
    if text == "-":
        return True
    if not text.endswith((".json", ".json.gz")):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .json or .json.gz; to print, put --json last")
    return Path(text)
