"""Every test runs with the same thread count and seed, and leaves no flag behind."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_state():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser):
    parser.addoption("--op", default=None, help="only the tests of one op")
