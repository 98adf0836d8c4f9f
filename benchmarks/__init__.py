"""Benchmarks: one file per op (shapes named by the model that they come from, peers, bytes and FLOPs), models.py, and
harness.py, which times them. `fourdperf bench [OP|MODEL]` and `pytest benchmarks/ [--names OP,MODEL]` run the same
cases."""
