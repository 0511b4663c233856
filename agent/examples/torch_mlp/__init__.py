"""A PyTorch model whose every answer is a digest of its output's bytes."""
