#!/usr/bin/env bash
# Sets up .venv: torch first (a CPU build on machines without a GPU), then the project with its tested versions.
# Called by the Makefile; pip's own settings (index, proxies, local wheels) are respected throughout.
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3}
fail() { printf 'error: %s\n' "$1" >&2; exit 2; }

command -v "$python" >/dev/null || fail "$python not found: install Python 3.10 or newer, or name one: make PYTHON=python3.12 ..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$python" --version) is too old: 3.10 or newer is needed; name one: make PYTHON=python3.12 ..."
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "Python's venv is missing: on Debian or Ubuntu, apt install python3-venv"

[ -x .venv/bin/python ] || { echo "creating .venv"; "$python" -m venv .venv; }
pip=(.venv/bin/python -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet "pip>=23.2" "setuptools>=68" wheel

torch=$(grep '^torch==' constraints.txt)
has_gpu() { nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/nvidiactl ] || [ -e /dev/kfd ]; }

# What would pip's own settings install: a build that needs no CUDA packages? (Metadata only; nothing is downloaded.)
plain_build_is_cpu() {
  "${pip[@]}" install --dry-run --no-deps --ignore-installed --quiet --report - "$torch" 2>/dev/null | .venv/bin/python -c '
import json, sys
needs = json.load(sys.stdin)["install"][0]["metadata"].get("requires_dist", [])
sys.exit(any(n.startswith(("nvidia", "cuda", "triton")) for n in needs))'
}

if ! .venv/bin/python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '${torch#torch==}')" 2>/dev/null; then
  if has_gpu || [ "$(uname -s)" != Linux ] || plain_build_is_cpu; then
    echo "installing $torch"
    "${pip[@]}" install "$torch"
  else
    echo "installing $torch (CPU build: no GPU found)"
    "${pip[@]}" install --index-url https://download.pytorch.org/whl/cpu "$torch"
  fi
fi

echo "installing the project and its tested versions"
"${pip[@]}" install --constraint constraints.txt --editable ".[all,dev]"

date > .venv/.installed
echo "set up: .venv"
