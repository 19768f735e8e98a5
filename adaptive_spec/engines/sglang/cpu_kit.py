"""Starts a real SGLang server on a CPU, with the kit of examples/sglang-cpu, for the demonstration, tests and benchmarks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from adaptive_spec.errors import BadInput

KIT_VARIABLE = "ADAPTIVE_SPEC_SGLANG_KIT"
LAUNCH_K = 3


class CpuKit:
    """The kit of a checkout. Raises BadInput when it is not found."""

    def __init__(self) -> None:
        given = os.environ.get(KIT_VARIABLE)
        self.folder = Path(given) if given else Path(__file__).parents[3] / "examples" / "sglang-cpu"
        if not (self.folder / "run.sh").is_file():
            raise BadInput(
                f"the SGLang CPU kit is not in '{self.folder}': run from a checkout of the project, or set {KIT_VARIABLE}"
            )
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptive-spec-sglang"
        self.home = Path(os.environ.get("ADAPTIVE_SPEC_SGLANG_HOME") or default)

    def install(self, *arguments: str) -> None:
        """Install what is missing: minutes the first time, half a second after that. Raises BadInput when it fails."""
        try:
            subprocess.run([str(self.folder / "install.sh"), *arguments], check=True, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise BadInput(f"the SGLang CPU kit could not be installed: {error}; see above") from error

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs `arguments` in the kit's environment."""
        return [str(self.folder / "run.sh"), *arguments]

    def server_flags(
        self,
        port: int,
        algorithm: str = "EAGLE",
        models: str = "models",
        adaptive: str | None = "adaptive.json",
        k: int = LAUNCH_K,
        tp: int = 1,
        topk: int = 1,
        draft_tokens: int | None = None,
        dp: int = 1,
        attention_dp: int = 1,
        more: Sequence[str] = (),
    ) -> list[str]:
        """SGLang's flags. algorithm: "" for no speculation. models: "models" (tiny) or "models-64m". k: K at launch.
        tp: tensor-parallel ranks; more than one needs `bound_to_cores` in the server's environment, as does dp.
        topk, draft_tokens: branches and tokens of the tree that is verified, k + 1 tokens without branches. dp: replicas.
        attention_dp: data-parallel ranks of the attention, among the tp ranks. more: further flags.

        adaptive: file of candidate K, in the kit or anywhere; "" for SGLang's default ones; None for one K.
        """
        folder = self.home / models
        flags = [
            *(self.folder / "server_flags.txt").read_text().split(),
            "--port",
            str(port),
            "--model-path",
            str(folder / "target"),
            *(("--tp", str(tp)) if tp > 1 else ()),
            *(("--dp", str(dp)) if dp > 1 else ()),
            *(("--dp", str(attention_dp), "--enable-dp-attention") if attention_dp > 1 else ()),
            *more,
        ]
        if not algorithm:
            return flags
        flags += ["--speculative-algorithm", algorithm]
        if algorithm == "NGRAM":
            return [*flags, "--speculative-num-draft-tokens", str(k + 1)]
        flags += ["--speculative-draft-model-path", str(folder / algorithm.lower())]
        flags += [
            "--speculative-num-steps",
            str(k),
            "--speculative-eagle-topk",
            str(topk),
            "--speculative-num-draft-tokens",
            str(draft_tokens or k + 1),
        ]
        if adaptive is not None:
            flags += ["--speculative-adaptive"]
        if adaptive:
            flags += ["--speculative-adaptive-config", str(self.folder / adaptive)]
        return flags

    @staticmethod
    def bound_to_cores(tp: int) -> dict[str, str]:
        """SGLang's environment for several ranks on one NUMA node: the cores of each, shared where there are too few."""
        cores = os.cpu_count() or 1
        return {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(rank % cores) for rank in range(tp))}
