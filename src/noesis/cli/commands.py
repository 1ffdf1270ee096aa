"""What the commands of the command line do: from parsed arguments to an answer."""

from __future__ import annotations

import inspect
import io
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import files
from ..errors import BadValue, WrongState, require
from ..layers import select
from ..results import Trace, compare, load_run, load_runs, token_deltas
from ..text import escaped, plain, table
from ..wrapping import capture, wrap
from . import models
from .outputs import check_outputs

#: Exit code of a comparison past the bound of --fail-over.
FAILED = 1


class Answer(NamedTuple):
    """What a command has to say.

    Attributes:
        text: makes the result for people.
        json: makes it for machines.
        code: the exit code.
    """

    text: Callable[[], str]
    json: Callable[[], str]
    code: int = 0


#: Tells what else happens, such as files that are written.
Note = Callable[[str], None]


# ---------------------------------------------------------------- running models


def _trace(args: Namespace, note: Note) -> Answer:
    out = Path(args.out)
    _check_format(args, out)
    picture = str(out / "image.png") if args.image == "" else args.image
    check_outputs([*(("--out", path) for path in _written(args, out)), ("--image", picture)], args.force)
    args.device = models.device_of(args.device)  # first of all, since it costs nothing
    pipeline = models.kind_of(args.model) == "pipeline"
    if not pipeline:
        trace, ending = _trace_language_model(args)
        _write(trace, out, args, note)
        return Answer(lambda: f"{trace!r}\n{ending}", trace.to_json)
    image = None if picture is None else _image_file(picture)
    trace, output = _trace_pipeline(args)
    _write(trace, out, args, note)
    if image is not None:
        note(f"wrote {_save_image(output, *image)}")
    return Answer(lambda: repr(trace), trace.to_json)


def _trace_pipeline(args: Namespace) -> tuple[Trace, Any]:
    """The trace of one call of a pipeline, and what the pipeline returned."""
    _refuse(args, "a language model", "max_new_tokens", "temperature")
    pipe = models.load_pipeline(args.model, args.device, args.dtype)
    parameters = inspect.signature(pipe.__call__).parameters
    given = {
        "prompt": ("--prompt", args.prompt),
        "negative_prompt": ("--negative-prompt", args.negative_prompt),
        "num_inference_steps": ("--steps", args.steps),
        "guidance_scale": ("--guidance", args.guidance),
        "height": ("--height", args.height),
        "width": ("--width", args.width),
    }
    options: dict[str, Any] = {}
    for name, (flag, value) in given.items():
        if value is not None and name not in parameters:
            raise BadValue(
                f"{flag} is given, and {type(pipe).__name__} takes no {name}", "options it takes", f"Leave out {flag}"
            )
        if value is not None:
            options[name] = value
    if args.image is None and "output_type" in parameters:
        options["output_type"] = "latent"  # nobody looks at the image, so nobody decodes it
    # On the CPU, so that a seed means the same noise on every device.
    options["generator"] = torch.Generator("cpu").manual_seed(args.seed)
    # A step is up to two forwards in a second-order scheduler, and twice that with guidance in two calls.
    wrapped = wrap(pipe, layers=_selector(args), per_sample=args.per_sample, capacity=max(256, 4 * (args.steps or 0)))
    try:
        output = pipe(**options)
    except ValueError as error:  # sizes it cannot make, for example
        why = str(error).rstrip(".")
        raise BadValue(
            f"{type(pipe).__name__} cannot run with these options ({why})", "options it can run with", "Change them"
        ) from error
    return wrapped.trace(), output


def _trace_language_model(args: Namespace) -> tuple[Trace, str]:
    """The trace of going on with a prompt, and a line that says how it went on."""
    from .prompts import generate

    _refuse(args, "a diffusion pipeline", "negative_prompt", "steps", "guidance", "height", "width", "image")
    model, tokenizer = models.load_language_model(args.model, args.device, args.dtype)
    options = _generation(args)
    capacity = max(256, 1 + options["max_new_tokens"])
    wrapped = wrap(model, layers=_selector(args), per_sample=args.per_sample, capacity=capacity)
    with wrapped.run(prompt=args.prompt, transformers_version=version("transformers"), **options):
        generated = generate(wrapped, tokenizer, args.prompt, **options)
    trace = wrapped.trace()
    trace.meta["generated"] = generated
    return trace, f"generated: {generated!r}"


def _tokens(args: Namespace, note: Note) -> Answer:
    from .prompts import forward

    check_outputs([("--plot", args.plot)], args.force)
    model, tokenizer = language_model(args)
    with capture(model, _selector(args)) as acts_a:
        tokens_a = forward(model, tokenizer, args.a)
    with capture(model, _selector(args)) as acts_b:
        tokens_b = forward(model, tokenizer, args.b)
    deltas = token_deltas(acts_a, acts_b, tokens_a, tokens_b, threshold=args.threshold)
    draw(deltas, args.plot, note)
    return Answer(lambda: repr(deltas), deltas.to_json)


def _routes(args: Namespace, note: Note) -> Answer:
    from .prompts import generate

    check_outputs([("--out", args.out), ("--plot", args.plot)], args.force)
    model, tokenizer = language_model(args)
    _check_routers(model, args.model)
    options = _generation(args)
    wrapped = wrap(model, layers="routers", capacity=max(256, 1 + options["max_new_tokens"]))
    with wrapped.run(prompt=args.prompt, **options):
        generate(wrapped, tokenizer, args.prompt, **options)
    routes = wrapped.routes()
    if args.out is not None:
        routes.save(args.out)
        note(f"wrote {args.out}")
    draw(routes, args.plot, note)
    return Answer(lambda: repr(routes), routes.to_json)


def _layers(args: Namespace, _: Note) -> Answer:
    found = [
        (name, type(module).__name__, sum(parameter.numel() for parameter in module.parameters()))
        for name, module in select(models.without_weights(args.model), _selector(args))
    ]

    def text() -> str:
        lines = [[name, kind, f"{parameters:,}"] for name, kind, parameters in found]
        return f"{len(found)} layers\n{table(['layer', 'class', 'parameters'], lines, most=len(lines))}"

    def json() -> str:
        rows = [dict(zip(("layer", "class", "parameters"), row, strict=True)) for row in found]
        return files.dump_json({"model": args.model, "selector": _selector(args), "layers": rows})

    return Answer(text, json)


def _diff(args: Namespace, note: Note) -> Answer:
    from .two_models import diff_of

    check_outputs([("--plot", args.plot)], args.force)
    if args.plot is not None:
        require("matplotlib", extra="viz", purpose="--plot")  # before the models run, not after
    args.layers = _selector(args)
    result = diff_of(args)
    draw(result, args.plot, note)
    # Not `distance > bound`: one that is NaN has to fail too; and 0 allows no bit, of elements that were not kept too.
    failed = args.fail_over is not None and not result.distance <= args.fail_over
    failed |= args.fail_over == 0 and not result.equal.all()
    if failed:
        note(f"the relative error {result.distance:.4g} is over {args.fail_over:g}")
    return Answer(lambda: str(result), result.to_json, FAILED if failed else 0)


# ---------------------------------------------------------------- saved runs


def _show(args: Namespace, note: Note) -> Answer:
    check_outputs([("--plot", args.plot)], args.force)
    run = load_run(args.run_path, args.run)
    draw(run, args.plot, note)
    meta = "".join(f"\n  {plain(name)}: {escaped(_in_a_line(value))}" for name, value in run.meta.items())
    return Answer(lambda: f"{run!r}\n\nmeta:{meta or ' none'}", run.to_json)


def _summarize(args: Namespace, note: Note) -> Answer:
    check_outputs([("--out", args.out)], args.force)
    soulprint = Trace.load(args.trace, args.run).soulprint(args.step)
    if args.out is not None:
        note(f"wrote {soulprint.save(args.out)}")
    return Answer(lambda: repr(soulprint), soulprint.to_json)


def _compare(args: Namespace, note: Note) -> Answer:
    whole = args.json if isinstance(args.json, Path) else None
    check_outputs([("--csv", args.csv), ("--json", whole), ("--plot", args.plot)], args.force)
    a, b = load_run(args.a, args.run_a), [load_run(path, args.run_b) for path in args.b]
    baseline = None if args.baseline is None else load_runs(args.baseline)
    if baseline is not None:
        note(f"the baseline has {len(baseline)} runs")
    result = compare(a, b, baseline=baseline, tolerance=args.tolerance, alpha=args.alpha)
    if args.csv is not None:
        note(f"wrote {result.to_csv(args.csv)}")
    if whole is not None:
        note(f"wrote {result.save(whole)}")
    if args.plot is not None:
        result.plot(args.top, args.plot)
        note(f"wrote {args.plot}")
    # Not `distance > bound`: a distance that is NaN has to fail too.
    failed = args.fail_over is not None and not result.distance <= args.fail_over
    if failed:
        note(f"the distance {result.distance:.4g} is over {args.fail_over:g}")
    return Answer(lambda: result.summary(args.top), result.to_json, FAILED if failed else 0)


# ---------------------------------------------------------------- what commands share


def language_model(args: Namespace) -> tuple[Any, Any]:
    """The language model of a command line, and its tokenizer."""
    if args.plot is not None:
        require("matplotlib", extra="viz", purpose="--plot")  # before the model runs, not after
    args.device = models.device_of(args.device)
    if models.kind_of(args.model) != "language model":
        raise BadValue(f"{args.model} is a diffusion pipeline", "a language model", "noesis trace runs pipelines")
    return models.load_language_model(args.model, args.device, args.dtype)


def _check_routers(model: torch.nn.Module, name: str) -> None:
    try:
        select(model, "routers")
    except BadValue:
        raise BadValue(
            f"{name} has no routers: no layer of {type(model).__name__} is one that noesis knows",
            "a Mixture-of-Experts model",
            "noesis trace looks into models of any kind",
        ) from None


def _in_a_line(value: Any) -> str:
    return value if isinstance(value, str) else files.dump_json(value)


def _selector(args: Namespace) -> str | list[str]:
    """One selector by itself, since it is what `meta` shows."""
    layers: str | list[str] = args.layers
    return layers[0] if isinstance(layers, list) and len(layers) == 1 else layers


def _generation(args: Namespace) -> dict[str, Any]:
    return {
        "max_new_tokens": 32 if args.max_new_tokens is None else args.max_new_tokens,
        "temperature": 0.0 if args.temperature is None else args.temperature,
        "seed": args.seed,
    }


def _refuse(args: Namespace, owner: str, *names: str) -> None:
    """Options that this kind of model would pass over are errors."""
    for name in names:
        if getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise BadValue(
                f"{flag} is an option for {owner}, and {args.model} is none", "options that fit", f"Leave out {flag}"
            )


def draw(result: Any, path: str | None, note: Note, **options: Any) -> None:
    """Draw a result, where a path says so."""
    if path is not None:
        result.plot(path=path, **options)
        note(f"wrote {path}")


def _check_format(args: Namespace, out: Path) -> None:
    if args.format == "json":
        stale = [name for name in ("trace.safetensors", "soulprint.safetensors") if (out / name).exists()]
        if stale:  # whoever reads the folder would take these for the run
            raise WrongState(f"{out} holds {stale[0]} of another run", "a folder of its own for JSON", "Change --out")
    elif args.single_file or args.no_gzip:
        flag = "--single-file" if args.single_file else "--no-gzip"
        raise BadValue(f"{flag} with --format safetensors", "--format json", f"Add --format json, or leave out {flag}")


def _written(args: Namespace, out: Path) -> list[Path]:
    """What `_write` will write, as far as it could be in the place of what is there."""
    # Traces of v0.1 have the new run's id in their names.
    names = ["soulprint.json"] if args.format == "json" else ["trace.safetensors", "soulprint.safetensors"]
    samples = out.glob(f"soulprint_sample*.{args.format}") if args.per_sample and out.is_dir() else ()
    return [*(out / name for name in names), *sorted(samples)]


def _write(trace: Trace, out: Path, args: Namespace, note: Note) -> None:
    """The trace, its soulprint, and with `--per-sample` the soulprint of each sample."""
    prints = {"soulprint": trace.soulprint()}
    prints |= {f"soulprint_sample{index}": sample.soulprint() for index, sample in enumerate(trace.samples)}
    if args.format == "json":
        paths = trace.save_v01(out, single_file=args.single_file, compress=not args.no_gzip)
        paths += [each.save_v01(out / f"{name}.json") for name, each in prints.items()]
    else:
        paths = [trace.save(out / "trace.safetensors")]
        paths += [each.save(out / f"{name}.safetensors") for name, each in prints.items()]
    for path in paths:
        note(f"wrote {path}")


def _image_file(name: str) -> tuple[Path, str]:
    """The path of an image, and what Pillow calls its format."""
    formats = require("PIL.Image", extra="diffusers", purpose="--image").registered_extensions()
    path = Path(name)
    if path.suffix.lower() not in formats:
        raise BadValue(
            f"--image {name} has the suffix {path.suffix!r}", ".png, .jpg or another of Pillow's", "Rename it"
        )
    return path, formats[path.suffix.lower()]


def _save_image(output: Any, path: Path, form: str) -> Path:
    images = getattr(output, "images", None)
    if not images:
        raise BadValue(f"the pipeline returned {type(output).__name__}, without images", "images", "Leave out --image")
    data = io.BytesIO()
    images[0].save(data, format=form)
    return files.write_bytes(path, data.getvalue())


COMMANDS: dict[str, Callable[[Namespace, Note], Answer]] = {
    "trace": _trace,
    "show": _show,
    "summarize": _summarize,
    "compare": _compare,
    "diff": _diff,
    "tokens": _tokens,
    "routes": _routes,
    "layers": _layers,
}
