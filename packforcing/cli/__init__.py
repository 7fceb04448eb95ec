"""The command line: python -m packforcing."""
