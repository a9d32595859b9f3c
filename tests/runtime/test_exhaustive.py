"""Every sequence of operations up to a depth, on pools of one to four blocks, against the model."""

import pytest
from allocator_world import World

OPERATIONS = [
    ("step_allocate", ([1], 0)),
    ("step_allocate", ([1, 1, 0], 0)),
    ("step_allocate_batch", ([([1, 1, 0], 0), ([1, 1], 0)],)),
    ("step_append", (0, [1])),
    ("step_append", (-1, [1, 0])),
    ("step_append_batch", ([0, -1], [1, 1])),
    ("step_commit", (0, -1)),  # all tokens
    ("step_commit", (-1, -1)),
    ("step_truncate", (0, 1)),
    ("step_fork", (0, 0)),
    ("step_free", (0,)),
    ("step_free", (-1,)),
    ("step_swap", (0,)),
]


def play(shape, path):
    world = World(**shape)
    for name, arguments in path:
        getattr(world, name)(*arguments)
    return world


@pytest.mark.parametrize(
    ("shape", "depth", "least"),
    [
        ({"num_blocks": 1, "block_size": 1, "num_swap_blocks": 1}, 8, 20),
        ({"num_blocks": 2, "block_size": 2, "num_swap_blocks": 1}, 7, 50),
        ({"num_blocks": 3, "block_size": 2, "num_swap_blocks": 2, "hash_bits": 0}, 6, 50),
        ({"num_blocks": 4, "block_size": 1, "num_swap_blocks": 2, "window": 1}, 6, 50),
        ({"num_blocks": 3, "block_size": 2, "prefix_cache": False}, 6, 50),
    ],
    ids=str,
)
def test_every_path(shape, depth, least):
    """States that were met before, up to the numbers of their sequences, are not gone on from again."""
    seen, frontier = set(), [()]
    calls = 0
    for _ in range(depth):
        longer = []
        for path in frontier:
            for operation in OPERATIONS:
                world = play(shape, path)
                calls += 1
                try:
                    getattr(world, operation[0])(*operation[1])
                    world.check()
                except AssertionError as error:
                    raise AssertionError(f"after {[*path, operation]}") from error
                state = fingerprint(world)
                world.end()
                if state not in seen:
                    seen.add(state)
                    longer.append((*path, operation))
        frontier = longer
    assert len(seen) >= least
    print(f"{len(seen)} states, {calls} steps")


def fingerprint(world):
    """The model's state without the names of its sequences and without counters."""
    m = world.model
    order = [(tuple(s.tokens), s.computed, s.swapped, s.first, tuple(s.table), s.base) for s in m.sequences.values()]
    indexes = (m.published, m.swap_published)
    published = [sorted((b, key[2], content) for b, (key, content) in index.items()) for index in indexes]
    return str((order, m.free, list(m.cached), m.swap_free, published))
