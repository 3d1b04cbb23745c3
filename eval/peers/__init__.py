"""Beside the peer: NVIDIA kvpress and transformers' own cache on the same prompts, budgets and seeds as ours.

python -m eval.peers install                 # an environment of its own: kvpress needs transformers < 5.3
python -m eval.peers compare --model smollm2 --budgets 0.5,0.25

| file | what |
|---|---|
| `pairs` | which of our methods is which press, with equal settings |
| `place` | the peer's environment: where it lies, making it |
| `kvpress_side` | runs inside it, and imports nothing of ours |
| `our_side` | the same work with our caches |
| `compare` | both, and the table |
"""
