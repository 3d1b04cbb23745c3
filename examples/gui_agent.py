"""A GUI agent on one web task, with GUI-KV keeping a share of every prompt's tokens.

    python examples/gui_agent.py
    python examples/gui_agent.py --model FOLDER --task click-tab --budget 0.2

It needs the extra `agents` and a Chromium (`python -m envs.install` finds or brings one). Each step is one screenshot,
one prompt, one answer; the answer is parsed into an action, never executed.
"""

import argparse

from agentkv import envs
from agentkv.agent import Agent, Limits, Step, run_episode
from agentkv.envs.browser import Browser
from agentkv.models import load_adapter

SEED = 1_000_000  # the embedded model was trained on those below


def show(step: Step) -> None:
    """One line for a step: what was held when the prompt had been read, what was said."""
    seen = step.decision
    share = seen.kv_bytes / seen.kv_bytes_full
    said = " / ".join(seen.text.splitlines())
    held = f"{seen.prompt_tokens} tokens, {seen.kv_bytes:,} bytes ({share:.1%} of full)"
    print(f"step {step.index}: {held}: {said}" + (f" [{step.error}]" if step.error else ""))


def main() -> None:
    """Play one episode."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mini", help="mini (embedded), a folder, or a hub id of a supported family")
    parser.add_argument("--method", default="gui-kv", help="a method or a composition, such as gui-kv+adakv")
    parser.add_argument("--budget", default="0.4", help="share of the prompt's tokens to keep, or 512t")
    parser.add_argument("--task", default="memory-code", help="name of a task")
    args = parser.parse_args()

    agent = Agent(load_adapter(args.model), args.method, args.budget)
    task = envs.task(args.task)
    with Browser() as browser:
        env = envs.WebEnv(task, browser)
        try:
            result = run_episode(env, agent, SEED, Limits(max_steps=task.max_steps), on_step=show)
        finally:
            env.close()
    print(f"{result.goal}: {'solved' if result.success else 'not solved'} in {result.steps} steps ({result.stop})")


if __name__ == "__main__":
    main()
