"""The tests. Every folder here is a package (has an __init__.py), so that names may repeat."""
