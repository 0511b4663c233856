"""Composition roots of the two daemons, and the host check that `hibernode doctor` runs."""
