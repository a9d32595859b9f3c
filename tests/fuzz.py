"""The fuzzers for as long as one likes: `python -m tests.fuzz [--cases N]` is tests/test_fuzz.py with more cases."""

import argparse
import os
import subprocess
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", help="only the group of calls that an op belongs to: attention, packed or rows")
    parser.add_argument("--cases", type=int, default=5000, help="calls through the dispatcher in each group")
    arguments = parser.parse_args()
    only = ["-k", arguments.op] if arguments.op else []
    command = [sys.executable, "-m", "pytest", str(Path(__file__).with_name("test_fuzz.py")), *only]
    return subprocess.run(command, env={**os.environ, "GENAI_KERNELS_FUZZ_CASES": str(arguments.cases)}).returncode


if __name__ == "__main__":
    sys.exit(main())
