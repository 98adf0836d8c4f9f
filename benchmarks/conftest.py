from fourdperf.ops import OPS


def pytest_addoption(parser):
    parser.addoption("--names", default=",".join(OPS), help="files in benchmarks/, as in models,d4rt; default all ops")
