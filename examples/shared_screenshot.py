"""A planner and an actor, two agents of one model, look at the same screenshot: one of them reads it, both have its KV.

    python examples/shared_screenshot.py
    python examples/shared_screenshot.py --model FOLDER --task click-tab --gamma 0.3

It needs the extra `agents` and a Chromium (`python -m envs.install` finds or brings one). The agents are told different
things before the screenshot, so its KV is moved and estimated from earlier screenshots; --gamma says how peaked their
weights must be, else an agent reads for itself. Each line says how many tokens of both prompts were read, beside the
screenshot once by itself, and whether the actor says what it would have said had it read everything.
"""

import argparse

from PIL import Image

from agentkv import envs
from agentkv.envs.browser import Browser
from agentkv.models import load_adapter
from textkv.reuse.kvcomm import Criteria, Dense, KVComm, picture

SEED, STEPS, ROLES = 1_000_000, 6, {"planner": "You plan what a GUI agent does", "actor": "GUI agent"}


def main() -> None:
    """Let both look at some screenshots, each once by dense prompts and once by shared ones."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", default="mini", help="mini (embedded), a folder, or a hub id of the Qwen-VL families"
    )
    parser.add_argument("--task", default="click-tab", help="name of a task")
    parser.add_argument(
        "--gamma", type=float, default=1.0, help="share of the largest entropy, see textkv.reuse.kvcomm"
    )
    args = parser.parse_args()

    adapter = load_adapter(args.model)
    model, tokenizer = adapter.model, adapter.tokenizer
    dense, sharing = Dense(model, tokenizer), KVComm(model, tokenizer, criteria=Criteria(args.gamma))
    for engine in (dense, sharing):
        for name, role in ROLES.items():
            chat = [{"role": "system", "content": role}, {"role": "user", "content": "{screenshot}{goal}"}]
            engine.add(name, tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    with Browser() as browser:
        env = envs.WebEnv(envs.task(args.task), browser)
        for step in range(STEPS):
            seen, _ = env.reset(seed=SEED + step)
            screen = picture(model, adapter.processor, Image.fromarray(seen["screenshot"]))
            told = [[e.call(who, {"screenshot": e.segment(screen), "goal": e.segment(seen["goal"])}) for who in ROLES]
                    for e in (dense, sharing)]  # fmt: skip
            whole, read = (sum(call.computed for call in calls) for calls in told)
            actor, same = told[1][-1].text, told[0][-1].answer.ids == told[1][-1].answer.ids
            print(f"step {step}: {read} of {whole} tokens read, answer {'unchanged' if same else 'CHANGED'}: {actor}")
        env.close()


if __name__ == "__main__":
    main()
