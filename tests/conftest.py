"""Every test runs with the same thread count and seed, and leaves no flag behind."""

import math

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
    parser.addoption("--enough", type=float, default=math.inf, help="elements of an output after which two draws do")


def pytest_collection_modifyitems(config, items):
    """--op=x keeps the tests with x as their `op` parameter, in their id, or in the name of their file, test_x*.py."""
    wanted = config.getoption("--op")
    if wanted is None:
        return

    def about(item):
        parameter = getattr(item, "callspec", None) and item.callspec.params.get("op")
        if parameter is not None:
            return getattr(parameter, "name", parameter) == wanted
        return item.path.stem.startswith(f"test_{wanted}") or wanted in item.name.partition("[")[2]

    kept = [item for item in items if about(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
