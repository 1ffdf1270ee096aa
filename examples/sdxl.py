"""What does a diffusion model do differently with two seeds?

    python examples/sdxl.py --model stabilityai/stable-diffusion-xl-base-1.0 --seeds 1 2

Observes the denoiser's blocks while the pipeline makes an image of each seed, then shows what
happened and which layers differ; writes the images, their soulprints and a picture of the difference.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import noesis


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of save_pretrained, or an id")
    parser.add_argument("--prompt", default="a glass moth in mauve twilight")
    parser.add_argument("--seeds", type=int, nargs=2, default=[1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, help="height and width in pixels; by default the model's own")
    parser.add_argument("--out", type=Path, default=Path("sdxl_runs"))
    args = parser.parse_args(argv)

    local = Path(args.model).is_dir()  # a folder needs no network
    pipe = DiffusionPipeline.from_pretrained(args.model, local_files_only=local)
    if torch.cuda.is_available():
        pipe.to("cuda", torch.float16)

    # What happened? Every call of the pipeline is a run of its own.
    wrapped = noesis.wrap(pipe, layers="blocks")
    args.out.mkdir(parents=True, exist_ok=True)
    soulprints = []
    for seed in args.seeds:
        image = pipe(
            args.prompt,
            num_inference_steps=args.steps,
            height=args.size,
            width=args.size,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        image.save(args.out / f"seed_{seed}.png")
        print(f"Seed {seed}: {wrapped.trace()}\n")
        soulprints.append(wrapped.soulprint())
        soulprints[-1].save(args.out / f"seed_{seed}.safetensors")
    wrapped.unwrap()

    # Which layers differ, and how much?
    comparison = noesis.compare(*soulprints)
    print(comparison)
    if importlib.util.find_spec("matplotlib"):
        comparison.plot(path=args.out / "comparison.png")
    print(f"\nWritten to {args.out}: images, soulprints and what changed between them.")


if __name__ == "__main__":
    main()
