"""Random input for everything that reads what a person, a model or a file says: `python -m tests.fuzz`."""
