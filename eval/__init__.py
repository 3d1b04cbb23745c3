"""The measuring rooms: one module per question, each a command that prints a table and writes JSON."""
