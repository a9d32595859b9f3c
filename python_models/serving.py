"""Continuous batching: many requests share one model, one pool of cache blocks and every forward pass.

Each step takes what every running request needs next (a chunk of its prompt, one token, or a draft to verify) into one
mixed batch, within a budget of tokens. What a request answers does not depend on what else is in the batch: the model's
products and the attention have the same bits whatever they are computed with, and the random numbers of a token are
counted from its request's seed and its place. So preemption, prefix reuse and drafts change the time, not the text.

`python -m python_models.serving` serves a checkpoint over HTTP (serving_http.py), or measures (serving_bench.py).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

import genai_kernels as gk
from genai_kernels.kv_cache import PagedKVCache
from genai_kernels.kv_cache import Request as Allocation
from python_models.llama import Llama
from python_models.lora_serving import BASE, Adapters
from python_models.serving_draft import Drafter


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen. Temperature 0 is greedy; `beams` > 1 is beam search, which draws nothing."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    beams: int = 1
    ignore_end: bool = False  # goes on past the model's end tokens

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.beams < 1:
            raise ValueError(
                f"Sampling: expected max_tokens and beams of at least 1, got {self.max_tokens} and {self.beams}"
            )
        if self.beams > 1 and self.temperature > 0:
            raise ValueError("Sampling: temperature: expected 0 with beams, which are not drawn")


@dataclass(eq=False)
class Branch:
    """One text of a request: its prompt and what was chosen so far. Beam search has several."""

    tokens: list[int]
    seq: int | None = None  # in the allocator, while it has blocks
    computed: int = 0  # tokens whose keys and values are in the cache
    drafted: int = 0  # tokens at the end of `tokens` that are a guess yet
    score: float = 0.0
    done: bool = False


@dataclass(eq=False)
class Request:
    """A prompt on its way to its answer. `on_token` is called with each token once it is certain."""

    prompt: list[int]
    sampling: Sampling
    on_token: Callable[[Request, int], None] | None = None
    salt: bytes = b""  # requests of one salt, and one adapter, share cached prefixes
    adapter: str = BASE
    branches: list[Branch] = field(default_factory=list)
    finished: list[Branch] = field(default_factory=list)  # beams that have come to an end
    state: str = "waiting"  # waiting, running, swapped, done, cancelled
    reason: str = ""  # why it is done: "stop", "length" or "cancelled"
    preemptions: int = 0
    cached_tokens: int = 0  # of the prompt, found in the prefix cache when it was admitted

    @property
    def output(self) -> list[int]:
        """The tokens chosen so far; of the best beam."""
        branch = self.branches[0] if self.branches else Branch(self.prompt)
        return branch.tokens[len(self.prompt) : len(branch.tokens) - branch.drafted]


class Engine:
    """Serves requests from one model.

    Args:
        model: what answers.
        num_blocks, block_size: the pool of cache blocks.
        max_batch_tokens: tokens of one step; longer prompts are cut into chunks.
        max_running: requests that run at once.
        preemption: what happens to the latest request when the pool is full: "recompute" or "swap" (to
            `num_swap_blocks` blocks; recomputed where those are full).
        drafter: for speculative decoding, with guesses of up to `draft_tokens` tokens; None for none.
        prefix_cache, int8: see `PagedKVCache`.
        adapters: of the model, of which each request may name one; None: requests are for the model itself.
    """

    def __init__(
        self,
        model: Llama,
        *,
        num_blocks: int = 512,
        block_size: int = 16,
        max_batch_tokens: int = 512,
        max_running: int = 64,
        preemption: str = "recompute",
        num_swap_blocks: int = 0,
        drafter: Drafter | None = None,
        draft_tokens: int = 4,
        prefix_cache: bool = True,
        int8: bool = False,
        adapters: Adapters | None = None,
    ) -> None:
        if preemption not in ("recompute", "swap"):
            raise ValueError(f'Engine: preemption: expected "recompute" or "swap", got {preemption!r}')
        config = model.config
        windows = {config.window_size(i)[0] for i in range(config.layers)}
        self.model, self.config, self.adapters = model, config, adapters
        self.cache = PagedKVCache(
            config.layers, config.kv_heads, config.head_dim, num_blocks=num_blocks, block_size=block_size,
            like=model.embedding.weight, num_swap_blocks=num_swap_blocks, prefix_cache=prefix_cache, int8=int8,
            window=None if -1 in windows else max(windows),
        )  # fmt: skip
        self.blocks = self.cache.blocks
        self.max_batch_tokens, self.max_running, self.preemption = max_batch_tokens, max_running, preemption
        self.drafter, self.draft_tokens = drafter, draft_tokens
        self.waiting: list[Request] = []
        self.running: list[Request] = []  # in the order of their arrival
        self.steps = 0

    # ---- requests come and go ----

    def add(self, prompt: Iterable[int], sampling: Sampling | None = None, **options) -> Request:
        """Queues a request; `options` are those of `Request`. ValueError if it could never run."""
        prompt, sampling = list(prompt), sampling or Sampling()
        total = len(prompt) + sampling.max_tokens
        if not prompt:
            raise ValueError("Engine.add: prompt: expected at least one token")
        if not all(0 <= t < self.config.vocabulary for t in prompt):
            raise ValueError(f"Engine.add: prompt: expected tokens from 0 to {self.config.vocabulary - 1}")
        if total > self.config.context:
            raise ValueError(
                f"Engine.add: expected at most {self.config.context} tokens with max_tokens, got {len(prompt)} and "
                f"{sampling.max_tokens}"
            )
        spare = self.draft_tokens if self.drafter and sampling.beams == 1 else 0
        needed = math.ceil((total + spare) / self.blocks.block_size) * sampling.beams + (sampling.beams > 1)
        if needed > self.blocks.num_blocks:
            raise ValueError(f"Engine.add: expected a request that fits {self.blocks.num_blocks} blocks, got {needed}")
        if sampling.beams + 1 > self.max_batch_tokens:
            raise ValueError(f"Engine.add: beams: expected fewer than {self.max_batch_tokens}, got {sampling.beams}")
        request = Request(prompt, sampling, **options)
        if self.adapters is not None:
            self.adapters.check(request.adapter)
        elif request.adapter != BASE:
            raise ValueError(f"Engine.add: adapter: expected {BASE}, the only one here, got {request.adapter!r}")
        request.branches = [Branch(list(prompt))]
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Gives a request's blocks back at once. Nothing happens to one that is done."""
        if request.state not in ("done", "cancelled"):
            self._finish(request, "cancelled")

    def _finish(self, request: Request, reason: str) -> None:
        self._release(request)
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        request.state, request.reason = "cancelled" if reason == "cancelled" else "done", reason

    def _release(self, request: Request) -> None:
        for branch in request.branches:
            if branch.seq is not None:
                self.blocks.free(branch.seq)
            branch.seq, branch.computed = None, 0
            self._drop_draft(branch)

    @staticmethod
    def _drop_draft(branch: Branch) -> None:
        if branch.drafted:
            del branch.tokens[-branch.drafted :]
            branch.drafted = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def run(self) -> None:
        """Steps until every request is done."""
        while not self.idle:
            self.step()

    # ---- a step: schedule, compute, choose ----

    @torch.inference_mode()
    def step(self) -> int:
        """Computes one mixed batch; how many tokens it had."""
        self._admit()
        plan = self._plan()
        if not plan:
            return 0
        branches = [branch for branch, _ in plan]
        starts = [branch.computed for branch in branches]
        batch = self.cache.batch([b.seq for b in branches], starts, [end for _, end in plan])
        tokens = torch.tensor([t for branch, end in plan for t in branch.tokens[branch.computed : end]])
        # logits of the last token, where its prompt is complete, and of what a draft is verified against
        rows, wanted = [], []
        for (branch, end), last in zip(plan, batch.last.tolist(), strict=True):
            if end == len(branch.tokens):
                rows += range(last - branch.drafted, last + 1)
                wanted.append(branch)
        with self._adapted(plan):
            logits = self.model(tokens, batch.positions, batch, logits_of=torch.tensor(rows, dtype=torch.int64))
        for branch, end in plan:
            branch.computed = end
            self.blocks.commit(branch.seq, end - branch.drafted)
        self._choose(wanted, logits)
        self.steps += 1
        return len(tokens)

    def _adapted(self, plan: list[tuple[Branch, int]]):
        """The model as the requests of a step want it, each for its own tokens."""
        if self.adapters is None:
            return nullcontext()
        owner = self._owner()
        return self.adapters.routed([owner[b].adapter for b, _ in plan], [end - b.computed for b, end in plan])

    def _owner(self) -> dict[Branch, Request]:
        return {branch: request for request in self.running for branch in request.branches}

    def _admit(self) -> None:
        """Requests from the queue, in order, as long as there is room."""
        while self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            if request.state == "swapped":
                if not self.blocks.can_swap_in(request.branches[0].seq):
                    return
                self.cache.swap_in(request.branches[0].seq)
            else:
                # keys and values depend on the adapter: nobody finds those of another
                number = 0 if self.adapters is None else self.adapters.numbers[request.adapter]
                wanted = [Allocation(b.tokens, number, request.salt) for b in request.branches]
                # one block to grow into, so that it is not preempted by its own first token
                full = bool(self.running) and self.blocks.num_available_blocks < 2
                if full or not self.blocks.can_allocate_batch(wanted):
                    return
                for branch, seq in zip(request.branches, self.blocks.allocate_batch(wanted), strict=True):
                    branch.seq, branch.computed = seq, self.blocks.num_cached_tokens(seq)
                request.cached_tokens = request.branches[0].computed
            request.state = "running"
            self.waiting.pop(0)
            self.running.append(request)

    def _plan(self) -> list[tuple[Branch, int]]:
        """Which branches are computed up to which token. The tokens chosen last get their slots here."""
        plan: list[tuple[Branch, int]] = []
        budget = self.max_batch_tokens
        for request in list(self.running):
            if request.state != "running":
                continue  # preempted by one before it
            needs = [len(b.tokens) - b.computed for b in request.branches]
            together = len(request.branches) > 1  # beams are compared with each other: all of them, or none
            if budget < (sum(needs) if together and sum(needs) <= self.max_batch_tokens else 1):
                break
            if not self._grow(request, budget):
                continue
            for branch in request.branches:
                end = min(len(branch.tokens), branch.computed + budget)
                if end > branch.computed:
                    plan.append((branch, end))
                    budget -= end - branch.computed
        return plan

    def _grow(self, request: Request, budget: int) -> bool:
        """Slots for all tokens of a request, a draft included; False if it was preempted itself."""
        if self.drafter and len(request.branches) == request.sampling.beams == 1:
            branch = request.branches[0]
            left = request.sampling.max_tokens - len(request.output) - 1
            count = min(self.draft_tokens, left, budget - 1)
            if branch.computed == len(branch.tokens) - 1 and count > 0 and not branch.drafted:
                draft = self.drafter.propose(request, branch.tokens, count)[:count]
                new = len(branch.tokens) - self.blocks.num_tokens(branch.seq) + len(draft)
                if draft and self.blocks.can_append(branch.seq, new):
                    branch.tokens += draft
                    branch.drafted = len(draft)
        seqs = [b.seq for b in request.branches]
        new = [b.tokens[self.blocks.num_tokens(b.seq) :] for b in request.branches]
        while not self.blocks.can_append_batch(seqs, [len(t) for t in new]):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        self.cache.copy(self.blocks.append_batch(seqs, new))
        return True

    def _preempt(self, request: Request) -> None:
        """Takes the blocks of a request away; it goes on, unchanged, when there is room again."""
        for branch in request.branches:
            self._drop_draft(branch)
        first = request.branches[0].seq
        state = "waiting"
        if self.preemption == "swap" and len(request.branches) == 1 and self.blocks.can_swap_out(first):
            self.blocks.truncate(first, max(request.branches[0].computed, 1))
            self.cache.swap_out(first)
            state = "swapped"
        else:
            self._release(request)
        self.running.remove(request)
        self.waiting.insert(0, request)
        request.state, request.preemptions = state, request.preemptions + 1

    # ---- tokens are chosen ----

    def _choose(self, branches: list[Branch], logits: torch.Tensor) -> None:
        owner = self._owner()
        logits_of, at = {}, 0
        for branch in branches:
            logits_of[branch] = logits[at : at + branch.drafted + 1]
            at += branch.drafted + 1
        singles = [b for b in branches if owner[b].sampling.beams == 1]
        for branch, chosen in zip(singles, self._draw(singles, owner, logits_of), strict=True):
            self._accept(owner[branch], branch, chosen)
        for request in dict.fromkeys(owner[b] for b in branches if owner[b].sampling.beams > 1):
            self._search(request, [logits_of[b] for b in request.branches if b in logits_of])

    def _draw(self, branches, owner, logits_of) -> list[list[int]]:
        """For each branch the token that its request chooses after each of its verified places."""
        if not branches:
            return []
        rows = [(owner[b], b, i) for b in branches for i in range(b.drafted + 1)]
        options = [request.sampling for request, _, _ in rows]
        texts = [b.tokens[: len(b.tokens) - b.drafted + i] for _, b, i in rows]
        penalised = any(o.repetition_penalty != 1 for o in options)
        extra = {}
        if penalised:
            width = max(map(len, texts))
            extra["previous_tokens"] = torch.tensor([t + [t[-1]] * (width - len(t)) for t in texts])
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            extra[name] = torch.tensor([getattr(o, name) for o in options], dtype=torch.float64)
        for name in ("top_k", "seed"):
            extra[name] = torch.tensor([getattr(o, name) for o in options])
        offset = torch.tensor([len(t) for t in texts])  # the place in the text: the same whatever led to it
        chosen = gk.sample(torch.cat([logits_of[b] for b in branches]), offset=offset, **extra).tolist()
        counts = iter(chosen)
        return [list(itertools.islice(counts, b.drafted + 1)) for b in branches]

    def _accept(self, request: Request, branch: Branch, chosen: list[int]) -> None:
        """The chosen tokens as far as the draft had guessed them, and the one after."""
        draft = branch.tokens[len(branch.tokens) - branch.drafted :]
        certain = next((i for i, (a, b) in enumerate(zip(chosen, draft, strict=False)) if a != b), len(draft)) + 1
        self._drop_draft(branch)
        if draft:
            self.blocks.truncate(branch.seq, len(branch.tokens) + certain - 1)
        for token in chosen[:certain]:
            branch.tokens.append(token)
            if request.on_token:
                request.on_token(request, token)
            if request.state == "cancelled":
                return None
            if reason := self._end(request, branch):
                return self._finish(request, reason)
        branch.computed = len(branch.tokens) - 1
        self.blocks.commit(branch.seq, branch.computed)
        return None

    def _end(self, request: Request, branch: Branch) -> str:
        if branch.tokens[-1] in self.config.ends and not request.sampling.ignore_end:
            return "stop"
        return "length" if len(branch.tokens) - len(request.prompt) >= request.sampling.max_tokens else ""

    def _search(self, request: Request, logits: list[torch.Tensor]) -> None:
        """One step of beam search: the best `beams` continuations of all beams go on, each in a fork of its parent."""
        beams = request.sampling.beams
        if len(logits) < len(request.branches):  # after a preemption: some have longer to go
            for branch in request.branches:  # the others wait for them, and compute their last token again
                branch.computed = min(branch.computed, len(branch.tokens) - 1)
            return
        scores = torch.stack([b.score + row[-1].double().log_softmax(-1) for b, row in
                              zip(request.branches, logits, strict=True)])  # fmt: skip
        best = scores.flatten().topk(min(2 * beams, scores.numel()))
        grown: list[tuple[Branch, Branch]] = []  # parent, child
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            parent = request.branches[index // scores.shape[1]]
            child = Branch([*parent.tokens, index % scores.shape[1]], None, parent.computed, 0, score)
            if self._end(request, child) == "stop":
                request.finished.append(child)
            elif len(grown) < beams:
                grown.append((parent, child))
        used: set[Branch] = set()
        for parent, child in grown:
            child.seq = self.blocks.fork(parent.seq)[0] if parent in used else parent.seq
            used.add(parent)
        for parent in request.branches:
            if parent not in used:
                self.blocks.free(parent.seq)
        request.branches = [child for _, child in grown]
        over = not grown or self._end(request, grown[0][1]) == "length"
        if over or len(request.finished) >= beams:
            ended = sorted(
                [*request.finished, *request.branches], key=lambda b: -b.score / (len(b.tokens) - len(request.prompt))
            )
            self._finish(request, "stop" if ended[0] in request.finished else "length")
            request.branches = ended[:beams]
            for token in request.output if request.on_token else ():
                request.on_token(request, token)


if __name__ == "__main__":
    from python_models.serving_http import main

    sys.exit(main())
