"""Checkpoints of the original projects to ours and back: one table per format, one file per model.

`npz.py` reads and writes `.npz` files an array at a time; `table.py` says how rows of a table are applied.
"""
