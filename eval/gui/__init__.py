"""Offline GUI benchmarks on data that the user supplies: one file per benchmark says how it is read and scored.

    python -m eval.gui --benchmark screenspot --data DIR --model mini --method full,gui-kv --budget 0.2

Nothing is fetched. Where the published form of a set, or its score, is not known for certain, the benchmark's file says
what is read instead.
"""
