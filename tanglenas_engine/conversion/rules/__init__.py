"""Rules that say for each operation which dimensions of its inputs and outputs belong together.

A rule unites dimensions, makes new ones, or fixes those that must keep their length. An operation without a rule fixes
every dimension that it touches. So a missing rule costs freedom, never correctness.

Each file has the rules of one kind of operation, and ends with a table of them by name.
"""
