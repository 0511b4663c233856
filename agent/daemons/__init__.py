"""Composition roots: the only callers of constructors."""
