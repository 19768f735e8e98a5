#!/usr/bin/env bash
# run.sh COMMAND ...: runs a command where vLLM works on a CPU. {models} in an argument becomes the folder of the tiny models.
#   ./run.sh adaptive-spec serve --engine vllm --mode active -- --model {models}/target ...
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
home=${ADAPTIVE_SPEC_VLLM_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/adaptive-spec-vllm}
export PATH="$home/venv/bin:$PATH" PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
export VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" VLLM_HOST_IP=127.0.0.1
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${@//\{models\}/$home/models}"
