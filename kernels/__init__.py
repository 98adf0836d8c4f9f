"""Triton kernels, one file per op; installed as fourdperf.kernels. Importing one needs the package triton."""
