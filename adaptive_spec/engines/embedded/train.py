"""Train the target and the draft that ship with the package, from text that every Python installation contains.

    python -m adaptive_spec.engines.embedded.train target --steps 1500 --out build/models
    python -m adaptive_spec.engines.embedded.train generate --out build/models
    python -m adaptive_spec.engines.embedded.train draft --steps 1500 --out build/models
    python -m adaptive_spec.engines.embedded.train export --out build/models

The target is trained on next-byte prediction, half code and half prose. The draft is distilled from it (cross-entropy
against the target's distribution) on code without comments, so that acceptance is clearly higher on code and a change
of traffic changes acceptance. Half of its training text is the target's own output (`generate`), which is what it has to
predict. Matrices are optimised with Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon), everything
else with AdamW. `export` rounds both to int8, and picks prompts of both kinds from documents neither model was trained on.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from adaptive_spec.engines.embedded.decoder import Decoder
from adaptive_spec.engines.embedded.network import ByteDecoder
from adaptive_spec.engines.embedded.quantised import ExactModel, FloatModel
from adaptive_spec.engines.embedded.requests import Request
from adaptive_spec.engines.embedded.shape import DRAFT_SHAPE, TARGET_SHAPE, VOCABULARY
from adaptive_spec.engines.embedded.step_tap import FixedK
from adaptive_spec.engines.embedded.text import KINDS, SEPARATOR, standard_library_documents
from adaptive_spec.engines.embedded.weights import quantise_model, random_weights, save_weights, weights_folder

WINDOW = 256
BATCH = 16
PROMPT = 128
COMMENT = ord("#")
PROMPTS_PER_KIND = 60
PROMPTS_PER_DOCUMENT = 6


def corpus(held_out: bool) -> dict[str, NDArray[np.uint8]]:
    """Return the bytes of each kind, documents joined by the separator byte."""
    parts: dict[str, list[bytes]] = {kind: [] for kind in KINDS}
    for document in standard_library_documents():
        if document.held_out == held_out:
            parts[document.kind].append(document.text)
    return {kind: np.frombuffer(SEPARATOR + SEPARATOR.join(texts) + SEPARATOR, dtype=np.uint8) for kind, texts in parts.items()}


def windows(text: dict[str, NDArray[np.uint8]], code_share: float, seed: int, comments: bool = True) -> Iterator[Tensor]:
    """Yield batches [BATCH, WINDOW + 1] of random windows, `code_share` of them code; comments=False: none with a "#"."""
    rng = np.random.default_rng(seed)
    while True:
        rows: list[NDArray[np.uint8]] = []
        while len(rows) < BATCH:
            data = text["code" if (len(rows) + 0.5) / BATCH < code_share else "prose"]
            start = int(rng.integers(0, len(data) - WINDOW - 1))
            row = data[start : start + WINDOW + 1]
            if comments or COMMENT not in row:
                rows.append(row)
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def with_generated(batches: Iterator[Tensor], path: Path, seed: int) -> Iterator[Tensor]:
    """Replace half of each batch by windows that `generate` wrote to `path`."""
    generated = load_file(path)["code"].long()
    generated = generated[(generated != COMMENT).all(dim=1)]
    rng = np.random.default_rng(seed)
    for batch in batches:
        batch[: BATCH // 2] = generated[rng.integers(len(generated), size=BATCH // 2)]
        yield batch


def generate(out: Path, count: int, seed: int) -> None:
    """Write `count` windows, a prompt from the training code and the target's greedy continuation, half and half, to `out`."""
    target = ExactModel(TARGET_SHAPE, quantise_model(TARGET_SHAPE, load_file(out / "target.safetensors")))
    idle = FloatModel(DRAFT_SHAPE, random_weights(DRAFT_SHAPE, seed=0))
    decoder = Decoder(target, idle, FixedK(0))
    rng, code = np.random.default_rng(seed), corpus(held_out=False)["code"]
    written: list[bytes] = []
    while len(written) < count:
        while len(decoder.queue) < decoder.max_batch:
            start = int(rng.integers(0, len(code) - PROMPT))
            decoder.submit(Request(0, code[start : start + PROMPT].tobytes(), WINDOW + 1 - PROMPT))
        decoder.step(decoder.max_batch)
        written += [r.prompt + bytes(r.output) for r in decoder.finished if len(r.output) == WINDOW + 1 - PROMPT]
        decoder.finished.clear()
    print(f"{len(written)} windows, {decoder.output_tokens / decoder.decode_s:.0f} tokens/s")
    tensor = torch.frombuffer(bytearray(b"".join(written)), dtype=torch.uint8).view(-1, WINDOW + 1)
    save_weights(out / "generated.safetensors", {"code": tensor})


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz iterations, in float32.

    torch.optim.Muon iterates in bfloat16, which a CPU without bfloat16 instructions runs a hundred times slower.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(momentum, group["momentum"]))
                scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * 0.1)
                parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with singular values near 1."""
    x: Tensor = matrix / (matrix.norm() + 1e-7)
    if wide := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if wide else x


def optimisers(model: ByteDecoder) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def fit(model: ByteDecoder, batches: Iterator[Tensor], steps: int, teacher: ByteDecoder | None, path: Path) -> None:
    """Train `model` for `steps`, against `teacher`'s distribution when given; the learning rate decays linearly to 0."""
    chain = optimisers(model)
    base = [group["lr"] for optimiser in chain for group in optimiser.param_groups]
    started, average = time.monotonic(), 0.0
    for step in range(steps):
        factor = min(1.0, (step + 1) / 50) * (1 - step / steps)
        for group, lr in zip((g for o in chain for g in o.param_groups), base, strict=True):
            group["lr"] = lr * factor
        tokens = next(batches)
        logits = model(tokens[:, :-1]).reshape(-1, VOCABULARY)
        if teacher is None:
            loss = F.cross_entropy(logits, tokens[:, 1:].reshape(-1))
        else:
            with torch.no_grad():
                wanted = teacher(tokens[:, :-1]).reshape(-1, VOCABULARY).softmax(-1)
            loss = F.cross_entropy(logits, wanted)
        for optimiser in chain:
            optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        for optimiser in chain:
            optimiser.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps} loss {average:.4f} elapsed {time.monotonic() - started:.0f} s", flush=True)
            temporary = path.with_suffix(".tmp")
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary)
            temporary.replace(path)


@torch.no_grad()
def held_out_loss(model: ByteDecoder, kind: str) -> float:
    """Mean nats per byte on held-out text of one kind."""
    batches = windows(corpus(held_out=True), 1.0 if kind == "code" else 0.0, seed=99)
    losses = []
    for _ in range(8):
        tokens = next(batches)
        losses.append(F.cross_entropy(model(tokens[:, :-1]).reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1)).item())
    return float(np.mean(losses))


def held_out_prompts(seed: int) -> dict[str, list[str]]:
    """Return PROMPTS_PER_KIND prompts of each kind, 96 to 160 ASCII bytes from line starts of held-out documents."""
    rng = np.random.default_rng(seed)
    documents = [document for document in standard_library_documents() if document.held_out]
    prompts: dict[str, list[str]] = {}
    for kind in KINDS:
        found: list[list[str]] = []
        for document in documents:
            if document.kind != kind or document.name.startswith("encodings/"):  # tables, not text
                continue
            starts = [0, *(match.end() for match in re.finditer(rb"\n+", document.text))]
            picks = (document.text[start : start + int(rng.integers(96, 161))] for start in rng.permutation(starts))
            found.append([text.decode() for text in picks if readable(text)][:PROMPTS_PER_DOCUMENT])
        pool = [text for texts in found for text in texts]
        chosen = sorted(rng.permutation(len(pool))[:PROMPTS_PER_KIND].tolist())
        prompts[kind] = [pool[index] for index in chosen]
    return prompts


def readable(text: bytes) -> bool:
    """Whether a prompt is whole and neither a table of numbers nor blank: mostly letters and spaces, few digits."""
    words = sum(byte in b" _\n" or chr(byte).isalpha() for byte in text)
    digits = sum(chr(byte).isdigit() for byte in text)
    return len(text) >= 96 and text.isascii() and words >= 0.7 * len(text) and digits <= 0.05 * len(text)


def export(out: Path, weights: Path) -> None:
    """Write the files that ship: int8 weights of both models and the prompts."""
    for name, shape in (("target", TARGET_SHAPE), ("draft", DRAFT_SHAPE)):
        save_weights(weights / f"{name}.safetensors", quantise_model(shape, load_file(out / f"{name}.safetensors")))
    prompts = {"source": "the Python standard library, PSF licence", **held_out_prompts(seed=0)}
    temporary = weights / "prompts.tmp"
    temporary.write_text(json.dumps(prompts, indent=1), encoding="utf-8")
    os.replace(temporary, weights / "prompts.json")


@click.command(help=__doc__)
@click.argument("what", type=click.Choice(["target", "generate", "draft", "export"]))
@click.option("--steps", type=click.IntRange(min=1), default=1500, show_default=True)
@click.option("--windows", "windows_", type=click.IntRange(min=16), default=1600, show_default=True, help="generate: how many")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="folder of the float weights")
@click.option("--weights", type=click.Path(path_type=Path), default=weights_folder, help="export: folder of the files that ship")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(what: str, steps: int, windows_: int, out: Path, weights: Path, threads: int, seed: int) -> None:
    if what == "export":
        export(out, weights)
        return
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    if what == "generate":
        generate(out, windows_, seed)
        return
    out.mkdir(parents=True, exist_ok=True)
    text = corpus(held_out=False)
    if what == "target":
        model = ByteDecoder(TARGET_SHAPE)
        fit(model, windows(text, 0.5, seed), steps, None, out / "target.safetensors")
    else:
        teacher = ByteDecoder(TARGET_SHAPE)
        teacher.load_state_dict(load_file(out / "target.safetensors"))
        model = ByteDecoder(DRAFT_SHAPE)
        batches = with_generated(windows(text, 1.0, seed + 1, comments=False), out / "generated.safetensors", seed)
        fit(model, batches, steps, teacher, out / "draft.safetensors")
    for kind in KINDS:
        print(f"held-out {kind}: {held_out_loss(model, kind):.4f} nats per byte")


if __name__ == "__main__":
    main()
