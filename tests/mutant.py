"""A planted fault, as the catalogues list them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    op: str
    name: str
    file: str
    old: str
    new: str
    units: tuple[str, ...]


def kernel(op):
    return f"csrc/ops/{op}/{op}_cpu.cpp"


def planted(op, file, *faults, units=None):
    return [Mutant(op, name, file, old, new, units or (file,)) for name, old, new in faults]
