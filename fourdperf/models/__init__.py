"""PyTorch models, one file each."""
