"""PagedKVCache: forks, swaps and evictions leave every sequence the keys and values that it stored."""

import random

import pytest
import torch

from genai_kernels.kv_cache import OutOfBlocksError, PagedKVCache


class Text:
    """A sequence and what should be in its slots: token t of it was stored as the numbers of `tokens[t]`."""

    def __init__(self, seq, tokens):
        self.seq, self.tokens, self.stored = seq, tokens, 0


def store(cache, texts):
    """Computes what is missing of each: the keys of a token are made of itself, the one before, and the layer."""
    missing = [t for t in texts if t.stored < len(t.tokens)]
    if not missing:
        return
    batch = cache.batch([t.seq for t in missing], [t.stored for t in missing], [len(t.tokens) for t in missing])
    ids = torch.tensor([x for t in missing for x in t.tokens[t.stored :]], dtype=torch.float32)
    for layer in range(2):
        k = (ids * 10 + layer).view(-1, 1, 1).expand(-1, 2, 8)
        batch.attend(layer, torch.zeros(len(ids), 2, 8), k, -k)
    for t in missing:
        t.stored = len(t.tokens)
        cache.blocks.commit(t.seq)


def check(cache, texts):
    for t in texts:
        if cache.blocks.is_swapped_out(t.seq):
            continue
        table = torch.frombuffer(cache.blocks.block_table(t.seq), dtype=torch.int32).long()
        for layer in range(2):
            for part, sign in ((0, 1), (1, -1)):
                found = cache.kv[table, layer, part].flatten(0, 1)[: t.stored]
                wanted = sign * (torch.tensor(t.tokens[: t.stored]).float() * 10 + layer).view(-1, 1, 1).expand(
                    -1, 2, 8
                )
                if cache.scales is None:
                    assert torch.equal(found, wanted)
                    continue
                # all numbers of a head are its largest: 127 times a scale that was rounded once
                found = found * cache.scales[table, layer, part].flatten(0, 1)[: t.stored, :, None]
                assert ((found - wanted).abs() <= 2**-22 * wanted.abs()).all()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_sequence_keeps_what_it_stored(seed, int8):
    """Random lives: common beginnings, growth, forks, swaps, truncation and ends, in a pool that is short."""
    rnd = random.Random(seed)
    cache = PagedKVCache(2, 2, 8, num_blocks=40, block_size=4, like=torch.zeros(0), num_swap_blocks=15, int8=int8)
    common = [rnd.randrange(1, 999) for _ in range(30)]
    texts, events = [], dict.fromkeys(["new", "grow", "fork", "out", "in", "cut", "end", "full"], 0)
    for _ in range(600):
        event = rnd.choice(["new", "grow", "grow", "grow", "fork", "out", "in", "cut", "end"])
        here = [t for t in texts if not cache.blocks.is_swapped_out(t.seq)]
        away = [t for t in texts if cache.blocks.is_swapped_out(t.seq)]
        text = rnd.choice(here) if here else None
        try:
            if event == "new":
                tokens = common[: rnd.randrange(30)] + [rnd.randrange(1, 999) for _ in range(rnd.randrange(1, 9))]
                new = Text(cache.blocks.allocate(tokens), tokens)
                new.stored = cache.blocks.num_cached_tokens(new.seq)
                texts.append(new)
            elif event == "grow" and text:
                more = [rnd.randrange(1, 999) for _ in range(rnd.randrange(1, 4))]
                cache.copy(cache.blocks.append(text.seq, more))
                text.tokens = text.tokens + more
            elif event == "fork" and text:
                texts += [Text(seq, text.tokens) for seq in cache.blocks.fork(text.seq, 2)]
                texts[-1].stored = texts[-2].stored = text.stored
            elif event == "out" and text:
                cache.swap_out(text.seq)
            elif event == "in" and away:
                cache.swap_in(away[0].seq)
            elif event == "cut" and text and len(text.tokens) > 3:
                length = rnd.randrange(len(text.tokens) // 2, len(text.tokens)) + 1
                cache.blocks.truncate(text.seq, length)
                text.tokens, text.stored = text.tokens[:length], min(text.stored, length)
            elif event == "end" and texts:
                cache.blocks.free(texts.pop(rnd.randrange(len(texts))).seq)
            else:
                continue
            events[event] += 1
        except OutOfBlocksError:
            events["full"] += 1
        store(cache, [t for t in texts if not cache.blocks.is_swapped_out(t.seq)])
        check(cache, texts)
    assert all(events.values()), events
    for t in texts:
        cache.blocks.free(t.seq)
    assert cache.blocks.stats()["used"] == 0


def test_sizes():
    cache = PagedKVCache(3, 2, 8, num_blocks=10, block_size=4, like=torch.zeros(0, dtype=torch.bfloat16))
    assert cache.nbytes == 10 * 3 * 2 * 4 * 2 * 8 * 2
    small = PagedKVCache(3, 2, 8, num_blocks=10, block_size=4, like=torch.zeros(0, dtype=torch.bfloat16), int8=True)
    assert small.nbytes == 10 * 3 * 2 * 4 * 2 * (8 + 4)
