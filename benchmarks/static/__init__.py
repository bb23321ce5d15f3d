"""What does not depend on the clock, in a table that is committed: `results/static.csv`.

`python -m benchmarks.static` counts launches, bytes and registers again, on any machine and without a GPU, and prints
what differs from the table.  A change that is meant is written with `--write` and committed with its reason; the tests
fail on every other one, for the worse and for the better.
"""
