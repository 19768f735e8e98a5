"""The embedded engine with a draft that proposes wrong tokens on demand, with the confidence of its best ones.

    python -m tests.support.lying_engine --runtime-dir DIR --lie FILE

While FILE exists the draft is wrong for `LIE_STEPS` steps, right for as many, and so on: faster than a calibration with a
memory of hundreds of steps can follow. K is the launch K, or the one the sidecar pins. It ends on SIGTERM.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive_spec.engine_side.tap import EngineTap
from adaptive_spec.engines.embedded.decoder import Decoder
from adaptive_spec.engines.embedded.load import PromptSource
from adaptive_spec.engines.embedded.models import MAX_BATCH, MAX_K, engine_info, load_models
from adaptive_spec.engines.embedded.requests import PrefixCache
from adaptive_spec.engines.embedded.text import KINDS
from adaptive_spec.engines.embedded.weights import load_prompts

LIE_STEPS = 300
CONCURRENCY = 2


class LyingDecoder(Decoder):
    """While `lies` is set, proposes the token id after the best one, with the confidence of the best one."""

    lies = False

    def _propose(
        self, logits: Tensor, temperatures: NDArray[np.float64], distributions: list[NDArray[np.float64]]
    ) -> tuple[Tensor, Tensor]:
        token, confidence = super()._propose(logits, temperatures, distributions)
        return ((token + 1) % logits.shape[-1] if self.lies else token), confidence


@click.command()
@click.option("--runtime-dir", type=click.Path(path_type=Path), required=True)
@click.option("--lie", type=click.Path(path_type=Path), required=True)
def main(runtime_dir: Path, lie: Path) -> None:
    torch.set_num_threads(1)
    models = load_models("cpu")
    tap = EngineTap.open(runtime_dir, engine_info(models))
    decoder = LyingDecoder(models.target, models.draft, tap, MAX_BATCH, MAX_K, PrefixCache(), 0)
    source = PromptSource(load_prompts(), 0)
    stopping: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)

    signal.signal(signal.SIGTERM, stop)
    while not stopping:
        while len(decoder.queue) < MAX_BATCH:
            decoder.submit(source.request(KINDS[0]))
        decoder.lies = decoder.steps // LIE_STEPS % 2 == 1 and lie.exists()
        decoder.step(CONCURRENCY)
        decoder.finished.clear()
    tap.close()


if __name__ == "__main__":
    main()
