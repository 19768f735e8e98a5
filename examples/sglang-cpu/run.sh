#!/usr/bin/env bash
# run.sh COMMAND ...: runs a command where SGLang works on a CPU. {models} in an argument becomes the folder of the tiny models.
#   ./run.sh adaptive-spec serve --mode active -- --model-path {models}/target ...
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
home=${ADAPTIVE_SPEC_SGLANG_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/adaptive-spec-sglang}
export PATH="$home/venv/bin:$PATH" PYTHONPATH="$repository:$here/kernel_stand_in${PYTHONPATH:+:$PYTHONPATH}"
export SGLANG_USE_CPU_ENGINE=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
export TORCHDYNAMO_DISABLE=1 # else the first request takes 5 to 20 s
exec "${@//\{models\}/$home/models}"
