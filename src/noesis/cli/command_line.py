"""The command line: reads arguments, has the command run, prints.

Results go to stdout and nothing else does; progress, notes and errors go to stderr. The exit code
is 0, 1 (`--fail-over`, past the bound), 2 (an error, told in one line) or 130 (interrupted).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .._version import __version__
from ..errors import NoesisError
from ..text import escaped
from .arguments import (
    add_command,
    add_force,
    add_generation,
    add_json,
    add_layers,
    add_model,
    add_seed,
    distance,
    from_zero,
    positive,
    printed_or_file,
)
from .interp_arguments import add_interp

ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        argv: the arguments without the program's name; by default the process's own.
    """
    try:
        code = _run(_parser().parse_args(argv))
        sys.stdout.flush()  # here, where a reader who has gone is expected
        return code
    except SystemExit as done:  # argparse, which has said why
        return done.code if isinstance(done.code, int) else 0
    except KeyboardInterrupt:
        _note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read has gone. What Python still flushes on its way out goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (NoesisError, OSError) as error:
        _note(f"error: {' '.join(str(error).split())}")
        return ERROR
    except Exception as error:  # not 1, which says that runs differ
        if os.environ.get("NOESIS_TRACEBACK"):
            raise
        _note(f"error: {type(error).__name__}: {' '.join(str(error).split())} (NOESIS_TRACEBACK=1 shows where)")
        return ERROR


def _run(args: argparse.Namespace) -> int:
    """Run the command and print its answer; torch is imported here, which --help has no need of."""
    if args.command == "demo":
        from .demo import run

        run(Path(args.out), force=args.force)  # tells its story itself
        return 0
    # A library that prints would spoil what is piped on: stdout is for the answer alone.
    with contextlib.redirect_stdout(sys.stderr):
        if args.command.startswith("interp"):
            from .interp_commands import COMMANDS
        else:
            from .commands import COMMANDS
        answer = COMMANDS[args.command](args, _note)
        text = answer.json() if args.json is True else answer.text()
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    return answer.code


def _note(text: str) -> None:
    print(f"noesis: {escaped(text)}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where the help is."""
        self.exit(ERROR, f"noesis: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="noesis",
        description="See what happens inside a PyTorch model while it runs.",
        epilog="Results go to stdout, notes to stderr. Exit codes: 0; 1 past --fail-over; 2 on errors.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"noesis {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_demo, _trace, _show, _summarize, _compare, _diff, _tokens, _routes, _layers, add_interp):
        add(commands)
    return parser


def _demo(commands: Any) -> None:
    parser = add_command(commands, "demo", "Train a small network, break one layer, and find it again.")
    parser.add_argument("--out", default="noesis-demo", metavar="DIR", help="where to write (default: %(default)s)")
    add_force(parser)


def _trace(commands: Any) -> None:
    about = "Run a diffusers pipeline or a causal language model, and record it."
    parser = add_command(commands, "trace", about, "trace-llm")
    add_model(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    add_seed(parser)
    add_layers(parser)
    parser.add_argument("--per-sample", action="store_true", help="keep the elements of the batch apart too")
    parser.add_argument("--out", default="noesis-out", metavar="DIR", help="where to write (default: %(default)s)")
    parser.add_argument(
        "--format", choices=("safetensors", "json"), default="safetensors", help="json: the files of noesis v0.1"
    )
    parser.add_argument("--single-file", action="store_true", help="json: all steps in one file")
    parser.add_argument("--no-gzip", action="store_true", help="json: do not compress")
    add_force(parser)
    add_json(parser)
    diffusion = parser.add_argument_group("diffusers pipelines (what is left out is the pipeline's default)")
    diffusion.add_argument("--negative-prompt", metavar="TEXT")
    diffusion.add_argument("--steps", type=positive, metavar="N")
    diffusion.add_argument("--guidance", type=float, metavar="SCALE")
    diffusion.add_argument("--height", type=positive, metavar="PIXELS")
    diffusion.add_argument("--width", type=positive, metavar="PIXELS")
    diffusion.add_argument(
        "--image", nargs="?", const="", metavar="FILE", help="write the image too (default: image.png in DIR)"
    )
    add_generation(parser.add_argument_group("language models"))


def _show(commands: Any) -> None:
    parser = add_command(commands, "show", "What a saved trace or soulprint holds, and what is known of its run.")
    parser.add_argument("run_path", metavar="RUN", help="a trace, a soulprint, or a folder of one")
    parser.add_argument("--run", metavar="ID", help="which run, where a folder holds several")
    parser.add_argument("--plot", metavar="FILE", help="draw it")
    add_force(parser)
    add_json(parser)


def _summarize(commands: Any) -> None:
    parser = add_command(commands, "summarize", "The soulprint of a trace.", "unet-summarize")
    parser.add_argument("trace", metavar="TRACE", help="a trace, or a folder of one")
    parser.add_argument("--out", metavar="FILE", help="write it to .safetensors, .json or .json.gz")
    parser.add_argument("--run", metavar="ID", help="which run, where a folder holds several")
    parser.add_argument("--step", type=from_zero, metavar="N", help="the soulprint of this step alone")
    add_force(parser)
    add_json(parser)


def _compare(commands: Any) -> None:
    about = "Where two runs differ, how much, and with a baseline, how surely."
    parser = add_command(commands, "compare", about, "compare-unet-soulprints", "soulprint-compare")
    parser.add_argument("a", metavar="A", help="a trace, a soulprint, or a folder of one")
    parser.add_argument("b", metavar="B", nargs="+", help="likewise; with --baseline also several, judged together")
    for name in "ab":
        parser.add_argument(f"--run-{name}", metavar="ID", help=f"which run, where {name.upper()} holds several")
    parser.add_argument("--baseline", metavar="DIR", help="runs that count as equal; B is held against their spread")
    parser.add_argument(
        "--alpha", type=float, default=0.05, metavar="RATE", help="false discovery rate (default: %(default)s)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="STDS",
        help="differences up to this many standard deviations are no divergence (default: 1e-05, or as dtypes round)",
    )
    parser.add_argument("--top", type=positive, default=25, metavar="N", help="rows to show (default: %(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="write all rows")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=printed_or_file,
        metavar="FILE",
        help="write everything to FILE, or print it (put it last, or give it as --json=-)",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the most changed layers")
    add_force(parser)
    parser.add_argument(
        "--fail-over", type=distance, metavar="DISTANCE", help="exit with 1 when the distance is larger; for CI"
    )


def _diff(commands: Any) -> None:
    about = "What differs between two models that are given the same inputs: layers, predictions, weights."
    parser = add_command(commands, "diff", about)
    for name in "ab":
        parser.add_argument(
            f"model_{name}",
            metavar=f"MODEL_{name.upper()}",
            help="a folder of save_pretrained, or an id; or captures: a file, or a folder of one for each input",
        )
    parser.add_argument(
        "--prompts",
        nargs="+",
        metavar="FILE|TEXT",
        help="texts; files of one a line; or .npz, .pt or .safetensors of tensors [inputs, ...]; give 8 or more",
    )
    add_layers(parser)
    for name in "ab":
        parser.add_argument(f"--dtype-{name}", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    parser.add_argument("--adapter-b", metavar="DIR_OR_ID", help="a LoRA, or another adapter of PEFT, for MODEL_B")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")
    parser.add_argument(
        "--baseline",
        type=from_zero,
        default=1,
        metavar="N",
        help="run A so many times more, to know what a model differs from itself (default: %(default)s)",
    )
    parser.add_argument(
        "--match-order", action="store_true", help="pair layers and weights that were renamed, by shape and order"
    )
    add_seed(parser)
    parser.add_argument("--steps", type=positive, metavar="N", help="of pipelines")
    parser.add_argument("--plot", metavar="FILE", help="draw the relative error by layer and input")
    add_force(parser)
    add_json(parser)
    parser.add_argument(
        "--fail-over",
        type=distance,
        metavar="ERROR",
        help="exit with 1 when a layer's relative error is larger, at 0 when any bit differs; for CI",
    )


def _tokens(commands: Any) -> None:
    parser = add_command(commands, "tokens", "How far two prompts are apart, token by token and layer by layer.")
    add_model(parser)
    parser.add_argument("--a", required=True, metavar="PROMPT")
    parser.add_argument("--b", required=True, metavar="PROMPT")
    add_layers(parser)
    parser.add_argument("--threshold", type=float, metavar="DELTA", help="from where on a token is divergent")
    parser.add_argument("--plot", metavar="FILE", help="draw the heat map")
    add_force(parser)
    add_json(parser)


def _routes(commands: Any) -> None:
    parser = add_command(commands, "routes", "Which experts the tokens of a prompt are sent to.", "trace-moe")
    add_model(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    add_seed(parser)
    add_generation(parser)
    parser.add_argument("--out", metavar="FILE", help="write everything to a file")
    parser.add_argument("--plot", metavar="FILE", help="draw the load of the experts")
    add_force(parser)
    add_json(parser)


def _layers(commands: Any) -> None:
    parser = add_command(commands, "layers", "What a selector matches in a model.")
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="a folder of save_pretrained, or an id")
    add_layers(parser)
    add_json(parser)
