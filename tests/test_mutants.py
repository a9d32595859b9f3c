"""Every planted fault still applies to the sources; `make mutants` builds them, which takes too long for every day."""

from pathlib import Path

import pytest
from mutant_catalogue import MUTANTS
from mutants import plant

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.op}-{m.name}")
def test_it_applies(mutant):
    text = (ROOT / mutant.file).read_text()
    assert plant(mutant, text) != text
    assert all((ROOT / unit).exists() for unit in mutant.units)


def test_there_are_many():
    assert len(MUTANTS) >= 80
    assert len({(m.op, m.name) for m in MUTANTS}) == len(MUTANTS)
