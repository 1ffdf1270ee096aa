"""What does a language model do differently with two prompts? Needs `pip install 'noesis[transformers]'`.

    python examples/llm.py DIR_OR_ID "Lily was happy." "Lily was sad."

Observes the model's blocks while it continues each prompt, then shows what happened, how far each
token is from its counterpart layer by layer, and which layers differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import noesis


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder of save_pretrained, or an id")
    parser.add_argument("a", nargs="?", default="Lily was happy. She went to the park with her mom.")
    parser.add_argument("b", nargs="?", default="Lily was sad. She went to the park with her mom.")
    parser.add_argument("--new-tokens", type=int, default=20)
    args = parser.parse_args(argv)

    local = Path(args.model).is_dir()  # a folder needs no network
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=local)
    model = AutoModelForCausalLM.from_pretrained(args.model, local_files_only=local)

    # What happened? One step for the prompt, then one per new token.
    wrapped = noesis.wrap(model, layers="blocks")
    traces = []
    for prompt in (args.a, args.b):
        inputs = tokenizer(prompt, return_tensors="pt")
        with wrapped.run(prompt=prompt):
            output = wrapped.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False)
        traces.append(wrapped.trace())
        print(f"{tokenizer.decode(output[0], skip_special_tokens=True)}\n\n{traces[-1]}\n")
    wrapped.unwrap()

    # Where do the prompts part? Full activations, token by token.
    runs, tokens = [], []
    for prompt in (args.a, args.b):
        inputs = tokenizer(prompt, return_tensors="pt")
        with noesis.capture(model, layers="blocks") as acts, torch.inference_mode():
            model(**inputs)
        runs.append(acts)
        tokens.append(tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist()))
    print(f"{noesis.token_deltas(*runs, *tokens)}\n")

    # Which layers differ, and how much?
    print(noesis.compare(*traces))


if __name__ == "__main__":
    main()
