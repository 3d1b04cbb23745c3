"""Which KV heads need the whole context: gates learned on synthetic passkeys, and the pattern files that hold them.

The method that uses a pattern is `textkv.methods.duo_attention` (arXiv 2410.10819). Of what is here, only pattern files
and, without one, `far_score` are used at inference.
"""
