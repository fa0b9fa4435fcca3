"""Hostile input in bulk: every reader of the project against valid files that were changed.

    python -m tools.fuzz [--inputs 100000] [--seconds S] [--readers recipe label ...] [--seed 0]

`readers.py` lists the readers, each with valid files to change, what is right, and the words of its format;
`changes.py` draws the changes; `__main__.py` runs them in processes (`worker.py`) that may crash or hang.
`guided.py` has atheris draw them, one reader at a time, where that is installed.
Failing inputs are kept in runs/fuzz, counts are written to runs/bench/fuzz.json. tests/fuzz runs a few of all,
drawn by hypothesis.
"""
