"""AgentNetBench (OpenCUA, arXiv 2508.09123): the next action of a computer-use agent at every step of recorded tasks,
scored against annotated right actions; no environment runs. `python -m eval.agentnetbench` is the command.

    atoms      atomic actions as the benchmark writes them, from and to the typed actions of our grammars
    records    the trajectories of a folder
    scoring    the score of a step: OpenCUA's first evaluator (v1), its later one (v2), GUI-KV's script (gui_kv)
    bench      a model answers every step, with every cache method, budget and number of screenshots
    figures    rows, intervals, tables and curves from the answers
    flops      what a decoded token costs, by formula and by counting
"""
