"""whalepy: annotate a local PyTorch model, compile it, train it on every device for what it is worth."""
