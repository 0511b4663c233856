"""Benchmarks: one module a promise (DESIGN section 11), run by `scripts/bench NAME [--json]`.

The first line of a module's docstring is what `scripts/bench --help` shows. A module measures both sides in one run,
prints a table (or with --json one object on stdout) with the ratio and its spread, and sends messages to stderr.
"""
