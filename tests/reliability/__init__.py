"""What goes wrong and what comes of it: tests that put a fault to every command, and the table that they make.

A test takes the fixture `reliability` and tells it `(kind, fault, command, outcome)` once per case, after its checks.
`python -m tests.reliability` runs all such tests and writes docs/reliability.json and docs/reliability.md from them.
"""
