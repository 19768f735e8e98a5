"""Starts a real vLLM server on a CPU, with the kit of examples/vllm-cpu, for the demonstration, tests and benchmarks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive_spec.engines.vllm.launch_schedule import KEY, for_launch
from adaptive_spec.errors import BadInput

KIT_VARIABLE = "ADAPTIVE_SPEC_VLLM_KIT"
LAUNCH_K = 5
CANDIDATES = (0, 1, 3, 5)
MAX_NUM_SEQS = 16
MODEL = "tiny"
SERVER_MODULE = "vllm.entrypoints.openai.api_server"


class CpuKit:
    """The kit of a checkout. Raises BadInput when it is not found."""

    def __init__(self) -> None:
        given = os.environ.get(KIT_VARIABLE)
        self.folder = Path(given) if given else Path(__file__).parents[3] / "examples" / "vllm-cpu"
        if not (self.folder / "run.sh").is_file():
            raise BadInput(
                f"the vLLM CPU kit is not in '{self.folder}': run from a checkout of the project, or set {KIT_VARIABLE}"
            )
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptive-spec-vllm"
        self.home = Path(os.environ.get("ADAPTIVE_SPEC_VLLM_HOME") or default)

    @property
    def installed(self) -> bool:
        """Whether vLLM was installed before, and its models made."""
        return all((self.home / name).is_file() for name in ("vllm.installed", "models.built", "models-informative.built"))

    def install(self, *arguments: str) -> None:
        """Install what is missing: minutes the first time, half a second after that. Raises BadInput when it fails."""
        try:
            subprocess.run([str(self.folder / "install.sh"), *arguments], check=True, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise BadInput(f"the vLLM CPU kit could not be installed: {error}; see above") from error

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs `arguments` in the kit's environment."""
        return [str(self.folder / "run.sh"), *arguments]

    def speculative_config(
        self, method: str, models: str = "models", k: int = LAUNCH_K, candidates: Sequence[int] | None = CANDIDATES,
        max_num_seqs: int = MAX_NUM_SEQS,
    ) -> dict[str, Any] | None:  # fmt: skip
        """Of a method: eagle, eagle3, draft_model, ngram; None for "" (no speculation). candidates: None for no schedule."""
        if not method:
            return None
        config: dict[str, Any] = {"method": method, "num_speculative_tokens": k}
        if method == "ngram":
            config |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
        else:
            config["model"] = str(self.home / models / {"draft_model": "standalone"}.get(method, method))
        if candidates is not None:
            config[KEY] = for_launch(candidates, max_num_seqs)
        return config

    def server_flags(
        self, port: int, method: str = "eagle", models: str = "models", k: int = LAUNCH_K,
        candidates: Sequence[int] | None = CANDIDATES, tp: int = 1, more: Sequence[str] = (),
    ) -> list[str]:  # fmt: skip
        """vLLM's flags; see `speculative_config`. tp: tensor-parallel ranks."""
        config = self.speculative_config(method, models, k, candidates)
        return [
            *(self.folder / "server_flags.txt").read_text().split(), "--port", str(port),
            "--model", str(self.home / models / "target"), "--served-model-name", MODEL,
            *(("-tp", str(tp)) if tp > 1 else ()),
            *(("--speculative-config", json.dumps(config)) if config is not None else ()),
            *more,
        ]  # fmt: skip
