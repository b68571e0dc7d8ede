"""Checkpoints: what they hold, whether they can be served, and how they get into memory.

`open.open_checkpoint`, `pool.Pool` and `load.load` are where to begin. Importing this package imports neither torch
nor the native module: those who only look at headers need none.
"""
