"""Random and hostile input to everything public: the outcome is success or a clear error, and nothing else.

A few hundred cases run with the other tests, always the same ones. `make fuzz` runs thousands, from a seed that it
prints: `POLYSCALE_FUZZ` is how many times as many.
"""
