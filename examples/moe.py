"""Which experts does a Mixture-of-Experts model send its tokens to?

    python examples/moe.py --model DIR_OR_ID --prompt "A glass moth in mauve twilight"

Observes the routers while the model continues a prompt, then shows how even the load is, which experts
work together, and where reading the prompt and writing on use other experts. Without a tokenizer in
the folder the prompt is a list of token ids, such as "5 17 33".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import noesis


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of save_pretrained, or an id")
    parser.add_argument("--prompt", default="A glass moth in mauve twilight")
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--plot", type=Path, help="write a heat map of the load here (.png, .svg or .pdf)")
    args = parser.parse_args(argv)

    folder = Path(args.model)
    local = folder.is_dir()  # a folder needs no network
    has_tokenizer = not local or any(folder.glob("tokenizer*"))
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=local) if has_tokenizer else None
    model = AutoModelForCausalLM.from_pretrained(args.model, local_files_only=local)
    ids = tokenizer(args.prompt)["input_ids"] if tokenizer else [int(number) for number in args.prompt.split()]
    ids = torch.tensor([ids])

    # One step for the prompt, then one per new token.
    wrapped = noesis.wrap(model, layers="routers", capacity=args.new_tokens + 1)
    with wrapped.run(prompt=args.prompt):
        output = wrapped.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new_tokens, do_sample=False
        )
    print(tokenizer.decode(output[0], skip_special_tokens=True) if tokenizer else output[0].tolist())
    routes = wrapped.routes()
    print(f"\n{routes}\n")

    # The pair of experts that most tokens of a layer are sent to.
    for layer, together, tokens in zip(routes.layers, routes.coactivation, routes.totals.tokens, strict=True):
        one, other = np.unravel_index(together.argmax(), together.shape)
        print(f"{layer}: experts {one} and {other} share {together[one, other] / max(1, tokens):.0%} of the tokens")

    # Half the sum of differences: the share of tokens that would have to move to make both loads equal.
    if len(routes) > 1:
        read, written = routes.counts[0], routes.counts[1:].sum(0)
        shares = [counts / counts.sum(-1, keepdims=True).clip(1) for counts in (read, written)]
        moved = abs(shares[0] - shares[1]).sum(-1) / 2
        most = moved.argmax()
        print(f"\nthe prompt and its continuation differ most in {routes.layers[most]}: {moved[most]:.0%} of the load")
    if args.plot is not None:
        routes.plot(args.plot)
        print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()
