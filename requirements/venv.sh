#!/usr/bin/env bash
# Makes .venv, or leaves it as it is: `venv.sh run` for the demo and the benchmarks, `venv.sh dev` for the tests and the
# linters too. It is made anew only when the pins, TORCH or the Python version have changed. Several at once take turns.
#   PYTHON=python3.12    the interpreter it is made from
#   TORCH="..."          what pip is asked for instead of requirements/torch.txt, for instance the smaller CPU build:
#                        TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
set -euo pipefail
cd "$(dirname "$0")/.."
readonly set=${1:?run or dev} python=${PYTHON:-python3} torch=${TORCH:--r requirements/torch.txt}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "genai_kernels: needs Python >= 3.10, $python is $("$python" -V 2>&1); name another one: make PYTHON=python3.12" >&2
  exit 1
}

exec 9> .venv.lock
flock 9

pins() { cat requirements/torch.txt requirements/constraints.txt requirements/run.txt && echo "$torch" && "$python" -V; }
install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --prefer-binary "$@" 2> >(grep -v '^WARNING: Location' >&2)
}

if ! { [ -x .venv/bin/python ] && pins | cmp -s - .venv/pins; }; then
  echo "making .venv ($("$python" -V), $torch)"
  rm -rf .venv
  "$python" -m venv .venv
  install -c requirements/constraints.txt -r requirements/run.txt
  # shellcheck disable=SC2086  several words, on purpose
  install -c requirements/constraints.txt $torch
  pins > .venv/pins
fi
if [ "$set" = dev ] && ! cmp -s requirements/dev.txt .venv/pins-dev; then
  echo "installing the tools of requirements/dev.txt"
  install -c requirements/constraints.txt -r requirements/dev.txt
  cp requirements/dev.txt .venv/pins-dev
fi
