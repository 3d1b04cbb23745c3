"""A diffusion language model, alone and with a causal model as its guide.

    python examples/diffusion.py
    python examples/diffusion.py --model FOLDER --guide FOLDER --prompt "..."

The embedded LLaDA solves a word problem with worked steps. Alone it commits one token per forward; with a guide the
drafts are kept as far as the guide agrees, so far fewer forwards give the same text.
"""

import argparse

import torch

from dlm import decode
from dlm.models import text_ids
from dlm.sources import open_guide, open_model

PROBLEM = "tom has 37 apples. he buys 25. he sells 14. how many now?"


def main() -> None:
    """Write the answer twice, and say what each cost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mini", help="mini (a small LLaDA), mini-dream, a folder, or a hub id")
    parser.add_argument("--guide", default="mini", help="mini, none, a folder, or a hub id of a causal model")
    parser.add_argument("--prompt", default=PROBLEM, help="what to go on from")
    parser.add_argument("--gen-length", type=int, default=64, help="tokens to generate")
    args = parser.parse_args()

    model, tokenizer = open_model(args.model, "cpu", torch.float32)
    runs = {"alone": {"cache": "none"}}
    if args.guide != "none":
        runs["guided"] = {"cache": "freecache", "guide": open_guide(args.guide, "cpu", torch.float32, tokenizer)}
    prompt = torch.tensor([text_ids(tokenizer, args.prompt)])
    print(args.prompt)
    for name, options in runs.items():
        done = decode(model, prompt, gen_length=args.gen_length, **options)
        cost = done.stats
        print(f"{name}: {tokenizer.decode(done.ids[0], skip_special_tokens=True).strip()}")
        print(
            f"  {cost.forwards} forwards, {cost.query_tokens} slots computed, {cost.cache_bytes_peak:,} bytes of cache"
        )


if __name__ == "__main__":
    main()
