"""Fork after use, several Python threads at once, one OpenMP runtime, and an import that changes nothing."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from calls import SAMPLES, build, run, same_bits

import genai_kernels as gk

ROOT = Path(__file__).resolve().parent.parent


def python(program, **environment):
    """What a program prints, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def attention_step():
    q, k, v = (torch.ones(1, 300, 2, 32).cumsum(1).requires_grad_() / 300 for _ in range(3))
    out = gk.flash_attention(q, k, v, causal=True)
    return [out.detach(), *torch.autograd.grad(out.sum(), [q, k, v]), gk.rms_norm(q.detach())]


def test_fork_after_use():
    """The parent's OpenMP threads do not exist in the child: whoever waits for them waits for ever."""
    torch.set_num_threads(2)
    expected = attention_step()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # what torch's own ops need in a child as well
        os._exit(0 if same_bits(attention_step(), expected) else 3)
    deadline, status = time.monotonic() + 30, None
    while status is None and time.monotonic() < deadline:
        done, code = os.waitpid(pid, os.WNOHANG)
        status = code if done else None
        time.sleep(0.01)
    if status is None:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert status == 0
    assert same_bits(attention_step(), expected)


def test_eight_threads_give_the_serial_bits():
    """Every op's samples from 8 Python threads, each in an order of its own, while torch's own pool is in use."""
    torch.set_num_threads(2)
    chosen = [(op, build(op, sample)) for op, sample in SAMPLES]
    expected = [run(op.function, call) for op, call in chosen]
    wrong, rounds = [], 3

    def work(number):
        for turn in range(rounds * len(chosen)):
            i = (turn * 37 + number * 11) % len(chosen)
            op, call = chosen[i]
            if not same_bits(run(op.function, call), expected[i]):
                wrong.append((number, op.name, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_openmp_runtime():
    program = """
import torch, genai_kernels as gk
gk.rms_norm(torch.randn(4096, 64))
print(open("/proc/self/maps").read())
"""
    libraries = set(re.findall(r"\S*lib(?:g|i|)omp\S*\.so\S*", python(program)))
    assert len(libraries) == 1, libraries


def test_import_changes_nothing():
    program = """
import os, threading, warnings, logging
import torch
def state():
    return {
        "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(),
        "generator": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "flush": torch.tensor([2e-38]).div(1e6).item(),
        "python threads": threading.active_count(),
        "tasks": len(os.listdir("/proc/self/task")),
        "filters": list(warnings.filters),
        "level": logging.getLogger().level,
        "environment": dict(os.environ),
        "attention": torch.nn.functional.scaled_dot_product_attention,
        "directory": os.getcwd(),
    }
before = state()
import genai_kernels
after = state()
assert before == after, {k: (before[k], after[k]) for k in before if before[k] != after[k]}
print("same")
"""
    assert python(program) == "same\n"


def test_calls_leave_the_state_of_torch_alone():
    """Seeds and flags after a call are those before it; only dropout without a seed draws from the generator."""
    before = torch.get_rng_state()
    attention_step()
    q = torch.ones(1, 4, 1, 8)
    gk.flash_attention(q, q, q, dropout_p=0.5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    gk.flash_attention(q, q, q, dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), before)
