"""Small language models whose layers share their attention weights, trained beside each other to be compared."""
