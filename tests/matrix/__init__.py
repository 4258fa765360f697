"""The matrix: the same questions asked of every family. `families.py` is the table, the test files are the columns."""
