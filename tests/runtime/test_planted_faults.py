"""Every planted fault still applies to the sources; `make mutants` builds them and looks whether the tests notice."""

import pytest
from planted_faults import MUTANTS, ROOT, plant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_it_applies(mutant):
    text = (ROOT / mutant.file).read_text()
    assert plant(mutant, text) != text


def test_there_are_many():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 40
