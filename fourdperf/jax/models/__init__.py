"""Flax references of the models, one file each: the same classes, in the same order, as the PyTorch files."""
