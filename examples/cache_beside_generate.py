"""A cache beside `model.generate()`: the same question to a full, a smaller and a packed cache.

    python examples/cache_beside_generate.py
    python examples/cache_beside_generate.py --model FOLDER      # a text model of your own

Somewhere in 512 tokens of filler lies one fact; the model is asked for it. `snapkv` keeps a fifth of the tokens,
`kivi(4)` keeps all of them at four bits.
"""

import argparse

import torch

from textkv import MethodCache
from textkv.mini.tasks import FIRST_EVALUATION_SEED, make_example
from textkv.models import load

METHODS = ("full", "snapkv", "kivi(4)")


def main() -> None:
    """Ask, and print for each method what was held and what was answered."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mini", help="mini (embedded), a folder, or a name of textkv.models")
    parser.add_argument("--budget", default="0.2", help="share of the tokens to keep, or a number of them: 128t")
    args = parser.parse_args()

    model, tokenizer = load(args.model)
    example = make_example("needle", 512, FIRST_EVALUATION_SEED, tokenizer)
    prompt = torch.from_numpy(example.prompt_ids)[None]
    print(f"...{example.prompt[-60:]} [{example.answer.strip()}]")

    for method in METHODS:
        cache = MethodCache(model, method, args.budget)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=len(example.answer_ids),
            do_sample=False,
        )
        answer = tokenizer.decode(out[0, prompt.shape[1] :]).strip()
        # As it was when the prompt had been read: `cache.report()` would count the answer's tokens and their slack too.
        held = cache.at_rest
        print(f"{method:<8} {held.kv_bytes:>12,} bytes, {held.kv_bytes / held.full_bytes:6.1%} of full: {answer}")


if __name__ == "__main__":
    main()
