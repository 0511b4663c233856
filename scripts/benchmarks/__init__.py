"""Benchmarks: one module per promise of agent/docs/specification.md, run by `scripts/bench NAME [--json]`.

`scripts/bench --help` shows the first line of each module's docstring. A module measures both sides in one run. It
prints a table (with --json an object) with the ratio and its spread on stdout, and messages on stderr.
"""
