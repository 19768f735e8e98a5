#!/usr/bin/env bash
# install.sh [--large]: a virtual environment with SGLang 0.5.23 for the CPU, adaptive-spec in it, and tiny models.
# About two minutes and 2.7 GB, once; they lie in $ADAPTIVE_SPEC_SGLANG_HOME (default ~/.cache/adaptive-spec-sglang).
# --large: also the 64M-parameter target of the benchmark. Run again, it only does what is missing.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
home=${ADAPTIVE_SPEC_SGLANG_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/adaptive-spec-sglang}
mkdir -p "$home"
exec 9>"$home/lock"
flock 9   # two test runs at once: the second waits and finds everything done

sum() { cat "$@" | sha256sum | cut -c1-16; }
done_before() { [ "$(cat "$home/$1" 2>/dev/null)" = "$2" ]; }

lists=$(sum "$here"/requirements*.txt "$repository/constraints.txt")
if ! done_before sglang.installed "$lists"; then
  echo "sglang-cpu: installing SGLang into $home/venv" >&2
  "${PYTHON:-python3}" -m venv --clear "$home/venv"
  pip() { "$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$repository/constraints.txt" "$@"; }
  pip torch setuptools wheel
  # Without their dependencies: SGLang asks for CUDA packages that a CPU has no use for. What it needs instead is in the list.
  pip --no-deps --requirement "$here/requirements-without-dependencies.txt"
  pip --requirement "$here/requirements.txt"
  rm -f "$home/package.installed"
  echo "$lists" >"$home/sglang.installed"
fi

# The package from this checkout: run.sh puts the checkout first on the path, the installation brings dependencies and entry points.
package=$(sum "$repository/pyproject.toml")
if ! done_before package.installed "$package"; then
  "$home/venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$repository/constraints.txt" \
    --editable "$repository" pytest
  echo "$package" >"$home/package.installed"
fi

build() { # build NAME FLAGS...
  local name=$1 recipe; shift
  recipe="$(sum "$here/build_models.py") $*"
  done_before "$name.built" "$recipe" && return
  rm -rf "${home:?}/$name"
  "$home/venv/bin/python" "$here/build_models.py" --out "$home/$name" "$@" >&2
  echo "$recipe" >"$home/$name.built"
}
build models
[ "${1:-}" != --large ] || build models-64m --hidden 512 --layers 16 --inter 2048 --heads 8 --kv-heads 4
