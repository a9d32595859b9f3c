"""Any order of operations: the allocator agrees with its model, and 15 invariants hold after every step.

Hypothesis shrinks a failure to a short story. 100,000 steps more are chosen by a seeded generator, which is faster, in
longer lives with pools of many shapes.
"""

import random

import hypothesis.strategies as st
import pytest
from allocator_world import INVARIANTS, RULES, World
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

HYPOTHESIS_RUNS, HYPOTHESIS_STEPS = 400, 50  # at most 20,000 steps
LIVES, STEPS = 200, 500  # 100,000 steps

TOKENS = st.lists(st.integers(0, 1), max_size=9)  # few different ones, so that many prompts begin alike
PROMPT = st.lists(st.integers(0, 1), min_size=1, max_size=9)
NUMBER = st.integers(0, 999)


class Machine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(1, 12),
        size=st.integers(1, 4),
        swap=st.integers(0, 8),
        window=st.none() | st.integers(0, 6),
        prefix_cache=st.sampled_from([True, True, True, False]),
        hash_bits=st.sampled_from([256, 256, 8, 0]),
    )
    def start(self, blocks, size, swap, window, prefix_cache, hash_bits):
        self.world = World(blocks, size, swap, window, prefix_cache, hash_bits)

    @rule(tokens=PROMPT, scope=NUMBER)
    def allocate(self, tokens, scope):
        self.world.step_allocate(tokens, scope)

    @rule(batch=st.lists(st.tuples(PROMPT, NUMBER), max_size=4))
    def allocate_batch(self, batch):
        self.world.step_allocate_batch(batch)

    @rule(which=NUMBER, tail=TOKENS, scope=NUMBER)
    def allocate_again(self, which, tail, scope):
        self.world.step_allocate_again(which, tail, scope)

    @rule(which=NUMBER, tokens=TOKENS)
    def append(self, which, tokens):
        self.world.step_append(which, tokens)

    @rule(choices=st.lists(NUMBER, max_size=6), tokens=st.lists(st.integers(0, 1), min_size=6, max_size=6))
    def append_batch(self, choices, tokens):
        self.world.step_append_batch(choices, tokens)

    @rule(which=NUMBER, amount=NUMBER)
    def commit(self, which, amount):
        self.world.step_commit(which, amount)

    @rule(which=NUMBER, amount=NUMBER)
    def truncate(self, which, amount):
        self.world.step_truncate(which, amount)

    @rule(which=NUMBER, n=NUMBER)
    def fork(self, which, n):
        self.world.step_fork(which, n)

    @rule(which=NUMBER)
    def free(self, which):
        self.world.step_free(which)

    @rule(which=NUMBER)
    def swap(self, which):
        self.world.step_swap(which)

    @rule()
    def drop_cached(self):
        self.world.step_drop_cached()

    @rule(kind=NUMBER, which=NUMBER)
    def nonsense(self, kind, which):
        self.world.step_nonsense(kind, which)

    @invariant()
    def all_invariants(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.end()


TestStateMachine = Machine.TestCase
TestStateMachine.settings = settings(
    max_examples=HYPOTHESIS_RUNS,
    stateful_step_count=HYPOTHESIS_STEPS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_there_are_enough_of_them():
    assert len(INVARIANTS) >= 12
    assert {name.removeprefix("step_") for name in RULES} <= set(vars(Machine))
    assert LIVES * STEPS >= 100_000


def arguments(name, draw):
    """Numbers for a rule, as hypothesis would choose them."""

    def number():
        return draw.randrange(1000)

    def tokens(least):
        return [draw.randrange(2) for _ in range(draw.randint(least, 9))]

    return {
        "step_allocate": lambda: (tokens(1), number()),
        "step_allocate_batch": lambda: ([(tokens(1), number()) for _ in range(draw.randint(0, 4))],),
        "step_allocate_again": lambda: (number(), tokens(0), number()),
        "step_append": lambda: (number(), tokens(0)),
        "step_append_batch": lambda: ([number() for _ in range(draw.randint(0, 6))], [draw.randrange(2)] * 6),
        "step_drop_cached": tuple,
        "step_free": lambda: (number(),),
        "step_swap": lambda: (number(),),
    }.get(name, lambda: (number(), number()))()


def live(seed, steps=STEPS):
    """One life of an allocator; the world at its end."""
    draw = random.Random(seed)
    world = World(
        num_blocks=draw.choice([1, 4, 8, 16, 24, 32]),
        block_size=draw.randint(1, 4),
        num_swap_blocks=draw.choice([0, 4, 12]),
        window=draw.choice([None, None, 0, 1, 3, 7]),
        prefix_cache=draw.random() < 0.85,
        hash_bits=draw.choice([256, 256, 4, 0]),
    )
    rare = {"step_drop_cached": 1, "step_nonsense": 2, "step_free": 30, "step_commit": 24, "step_truncate": 4}
    weights = [rare.get(name, 8) for name in RULES]
    for name in draw.choices(RULES, weights, k=steps):
        getattr(world, name)(*arguments(name, draw))
        world.check()
    return world


@pytest.mark.parametrize("part", range(10))
def test_random_lives(part):
    seen = dict.fromkeys(("prefix_hits", "evictions", "merged", "hash_collisions"), 0)
    failures = 0
    for seed in range(part * LIVES // 10, (part + 1) * LIVES // 10):
        world = live(seed)
        for name in seen:
            seen[name] += world.real.stats()[name]
        failures += world.failures
        world.end()
    # The lives were eventful, that is: a comparison was made where things happen.
    assert min(seen.values()) > 5, seen
    assert failures > 100
