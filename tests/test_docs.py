"""Every public function is documented, and every example in the documentation runs."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import genai_kernels

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PUBLIC = [n for n in genai_kernels.__all__ if callable(getattr(genai_kernels, n))]
# Importing __main__ runs it.
MODULES = [
    m.name
    for m in pkgutil.walk_packages(genai_kernels.__path__, "genai_kernels.")
    if not m.name.endswith(("._C", ".__main__"))
]


# Examples that run another library, which not every Python has.
NEED = {"genai_kernels.integrations.diffusers": "diffusers", "genai_kernels.integrations.peft": "peft"}


def run(test):
    output = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    runner.run(test, out=output.append)
    assert runner.failures == 0, "".join(output)
    return runner.tries


def examples(thing, name):
    """The doctests of one object; the public wrapper of an op counts as the module's own."""
    return [t for t in doctest.DocTestFinder(recurse=False).find(thing, name, module=False, globs={}) if t.examples]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_function_has_a_running_example(name):
    thing = getattr(genai_kernels, name)
    assert inspect.getdoc(thing), "no docstring"
    tests = examples(thing, name)
    assert tests, "no doctest in its docstring"
    assert sum(run(t) for t in tests) > 0


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_modules(name):
    if name in NEED:
        pytest.importorskip(NEED[name], reason=f"{NEED[name]} is not installed")
    module = importlib.import_module(name)
    assert inspect.getdoc(module), "no docstring"
    members = [module, *(m for m in vars(module).values() if getattr(m, "__module__", None) == name)]
    for member in members:
        if inspect.ismodule(member) or inspect.isclass(member) or inspect.isfunction(member):
            for test in examples(member, getattr(member, "__name__", name)):
                run(test)
            if inspect.isclass(member):
                for method in vars(member).values():
                    if inspect.isfunction(method):
                        for test in examples(method, method.__qualname__):
                            run(test)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_examples_of_pages(page):
    text = (ROOT / page).read_text().replace("```\n", "\n")  # a fence would count as expected output
    tried = run(doctest.DocTestParser().get_doctest(text, {}, page, page, 0))
    assert tried > 0 or page != "README.md"
