"""The mini text model: rows of recall tasks and ordinary text, hints, sinks and the training of a small Llama."""
