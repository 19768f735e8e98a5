"""Continuous batching with speculative decoding: draft K tokens per request, verify them in one ragged forward.

One step, for the b requests that are running:

    K           = tap.begin_step(...)
    draft       = tokens the draft has not seen (draft-extend, gives token 1 of K), then K - 1 forwards of one row each
    verify_len  = tap.verify_lengths(confidences)
    verify      = one packed forward of sum(verify_len + 1) rows
    output      = accepted draft tokens and one bonus token per request

With K = 0 the draft model does not run; the next step with K > 0 processes the tokens it has not seen. Running requests have
slots 0..b-1, parked ones follow: parking and resuming only change b, and a forward reads the cache through a view.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive_spec.domain.arrays import Ints
from adaptive_spec.domain.step_record import StepFlag
from adaptive_spec.engines.embedded.acceptance_rules import accept_greedy, accept_sampled, sample
from adaptive_spec.engines.embedded.kv_cache import KVCache, PackedRows
from adaptive_spec.engines.embedded.quantised import ByteModel, ExactModel, FloatModel
from adaptive_spec.engines.embedded.requests import PrefixCache, Request
from adaptive_spec.engines.embedded.shape import VOCABULARY
from adaptive_spec.engines.embedded.step_tap import StepTap
from adaptive_spec.engines.embedded.text import SEPARATOR

END_OF_TEXT = SEPARATOR[0]
_DENSE_ROWS = 24
"""Prefills of this many rows or more use the float32 kernel: bitwise equal results in about half the time."""


@dataclass(frozen=True)
class StepOutcome:
    """What a step did. step_s: seconds. accept_len, verify_len: [batch_size]."""

    batch_size: int
    k: int
    output_tokens: int
    step_s: float
    verify_len: NDArray[np.uint8]
    accept_len: NDArray[np.uint8]


@dataclass(frozen=True)
class _Drafted:
    """tokens [b, k]; confidences [b, k]; distributions[j] [b, vocabulary] only when a request is sampled."""

    tokens: Ints
    confidences: NDArray[np.float32]
    distributions: list[NDArray[np.float64]]
    extend_s: float
    draft_s: float
    disturbed: bool


class Decoder:
    """Decode requests with the target's exact output, K and verify lengths chosen by a tap.

    max_batch: most requests at once, running and parked. max_k: largest K the tap may ask for. prefixes: shared prompt KV.
    seed: of the sampled requests. clock: nanoseconds, monotonic. Raises ValueError when the models have no room for
    max_batch * (max_k + 1) rows.
    """

    def __init__(
        self, target: ExactModel, draft: FloatModel, tap: StepTap, max_batch: int = 16, max_k: int = 7,
        prefixes: PrefixCache | None = None, seed: int = 0, clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:  # fmt: skip
        if max_batch * (max_k + 1) > min(target.max_rows, draft.max_rows):
            raise ValueError(f"max_batch {max_batch} with max_k {max_k} needs more than {target.max_rows} rows of a forward")
        self.target, self.draft, self.tap = target, draft, tap
        self.max_batch, self.max_k, self.max_context = max_batch, max_k, min(target.max_context, draft.max_context)
        self.queue: deque[Request] = deque()
        self.finished: list[Request] = []
        self.running = self.parked = 0
        self.steps = self.output_tokens = 0
        self.decode_s = 0.0
        self._clock, self._random, self._prefixes = clock, np.random.default_rng(seed), prefixes
        self._target_cache, self._draft_cache = target.new_cache(max_batch), draft.new_cache(max_batch)
        self._requests: list[Request | None] = [None] * max_batch
        self._tokens = np.zeros((max_batch, self.max_context), dtype=np.int64)
        self._lengths = np.zeros(max_batch, dtype=np.int64)
        """Tokens known of each slot; all but the last are in the target's cache."""
        self._draft_seen = np.zeros(max_batch, dtype=np.int64)
        """Tokens in the draft's cache."""
        self._last_k = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not (self.running or self.parked or self.queue)

    def submit(self, request: Request) -> None:
        """Queue a request. Raise ValueError when it is empty or does not fit the context."""
        limit = self.max_context - self.max_k - 1
        if not request.prompt or request.max_new_tokens < 1 or len(request.prompt) + request.max_new_tokens > limit:
            raise ValueError(
                f"request {request.request_id}: prompt of {len(request.prompt)} bytes and max_new_tokens "
                f"{request.max_new_tokens} must be at least 1 each and at most {limit} together"
            )
        self.queue.append(request)

    def step(self, concurrency: int, most: int | None = None) -> StepOutcome | None:
        """Admit up to `concurrency` requests, or the batch the tap holds, and decode one step; None if nothing is to run.

        most: a batch larger than this is not held, by default max_batch.
        """
        self._set_batch(min(concurrency, self.max_batch), min(most or self.max_batch, self.max_batch))
        b = self.running
        if b == 0:
            return None
        started = self._clock()
        lengths = self._lengths[:b].copy()
        kv_tokens = int(lengths.sum())
        k = min(self.tap.begin_step(b, kv_tokens, started), self.max_k)
        temperatures = np.array([request.temperature for request in self._batch()])
        left = np.array([request.max_new_tokens - len(request.output) for request in self._batch()])
        drafted = self._draft(k, lengths, temperatures)
        verify_len = self._verify_lengths(drafted, temperatures, left)
        verify_started = self._clock()
        accept_len, bonus = self._verify(drafted, verify_len, lengths, temperatures)
        verify_ended = self._clock()
        output_len = self._output(drafted.tokens, accept_len, bonus)
        self._lengths[:b] = lengths + output_len
        if k:
            self._draft_seen[:b] = lengths + np.minimum(accept_len, k - 1)
        flags = StepFlag.DISTURBED if drafted.disturbed else 0
        if (output_len <= accept_len).any():
            flags |= StepFlag.CENSORED
        verified, accepted = verify_len.astype(np.uint8), (output_len - 1).astype(np.uint8)
        ids = np.array([request.request_id for request in self._batch()], dtype=np.uint32)
        num_tokens = int(verify_len.sum()) + b
        ended = self._clock()
        step_s = (ended - started) * 1e-9
        self.tap.end_step(
            now_ns=ended, num_tokens=num_tokens, padded_tokens=num_tokens, draft_s=drafted.draft_s,
            verify_s=(verify_ended - verify_started) * 1e-9, draft_extend_s=drafted.extend_s, step_s=step_s,
            confidences=drafted.confidences, verify_len=verified, accept_len=accepted, request_ids=ids, flags=int(flags),
        )  # fmt: skip
        self._last_k = k
        self.steps += 1
        self.output_tokens += int(output_len.sum())
        self.decode_s += step_s
        for slot in reversed(range(b)):
            if self._request(slot).ended:
                self._release(slot)
        return StepOutcome(b, k, int(output_len.sum()), step_s, verified, accepted)

    # Drafting, verification and output of one step.

    def _draft(self, k: int, lengths: Ints, temperatures: NDArray[np.float64]) -> _Drafted:
        b = len(lengths)
        if k == 0:
            return _Drafted(np.zeros((b, 0), dtype=np.int64), np.zeros((b, 0), dtype=np.float32), [], 0.0, 0.0, False)
        started = self._clock()
        disturbed = bool((lengths - self._draft_seen[:b]).max() > self.max_k + 1)
        logits = self._catch_up(lengths)
        self._synchronise()
        extended = self._clock()
        tokens: list[Tensor] = []
        confidences: list[Tensor] = []
        distributions: list[NDArray[np.float64]] = []
        at: PackedRows | None = None
        for position in range(k):
            if position:
                at = PackedRows.of(self._draft_cache, np.arange(b), lengths) if at is None else at.following(self._draft_cache)
                logits = self.draft.forward(self._draft_cache, tokens[-1], at)
            token, confidence = self._propose(logits, temperatures, distributions)
            tokens.append(token)
            confidences.append(confidence)
        chosen: Ints = torch.stack(tokens, dim=1).cpu().numpy()
        probabilities: NDArray[np.float32] = torch.stack(confidences, dim=1).cpu().numpy()
        ended = self._clock()
        return _Drafted(chosen, probabilities, distributions, (extended - started) * 1e-9, (ended - extended) * 1e-9, disturbed)

    def _propose(
        self, logits: Tensor, temperatures: NDArray[np.float64], distributions: list[NDArray[np.float64]]
    ) -> tuple[Tensor, Tensor]:
        """One draft token per request and the draft's probability of it, both [b]; for sampled requests q is kept."""
        confidence, token = logits.softmax(-1).max(-1)
        if not temperatures.any():
            return token, confidence
        q = _tempered(logits, temperatures)
        distributions.append(q)
        chosen, probability = token.cpu().numpy(), confidence.cpu().numpy()
        for row in np.flatnonzero(temperatures):
            chosen[row] = sample(q[row], self._random)
            probability[row] = max(q[row, chosen[row]], np.finfo(np.float32).tiny)
        return torch.from_numpy(chosen).to(logits.device), torch.from_numpy(probability)

    def _verify_lengths(self, drafted: _Drafted, temperatures: NDArray[np.float64], left: Ints) -> Ints:
        k = drafted.tokens.shape[1]
        if k == 0:
            return np.zeros(len(left), dtype=np.int64)
        verify_len = self.tap.verify_lengths(drafted.confidences).astype(np.int64)
        verify_len[temperatures > 0.0] = k  # see acceptance_rules: anything else would bias the sample
        # A request never outputs more than it may, so no label is lost at its end.
        return np.minimum(verify_len, left - 1)

    def _verify(self, drafted: _Drafted, verify_len: Ints, lengths: Ints, temperatures: NDArray[np.float64]) -> tuple[Ints, Ints]:
        b = len(lengths)
        rows = verify_len + 1
        first_row = np.cumsum(rows) - rows
        slots = np.repeat(np.arange(b), rows)
        within = np.arange(len(slots)) - first_row[slots]
        last = self._tokens[np.arange(b), lengths - 1]
        tokens = np.concatenate((last[:, None], drafted.tokens), axis=1)[slots, within]
        at = PackedRows.of(self._target_cache, slots, lengths[slots] - 1 + within)
        logits = self.target.forward(self._target_cache, self._device(tokens), at)
        best: Ints = logits.argmax(-1).cpu().numpy()
        accept_len, bonus = accept_greedy(drafted.tokens, verify_len, best, first_row)
        for row in np.flatnonzero(temperatures):
            v = int(verify_len[row])
            mine = logits[first_row[row] : first_row[row] + v + 1]
            p = _tempered(mine, np.full(v + 1, temperatures[row]))
            q = np.array([distribution[row] for distribution in drafted.distributions[:v]]).reshape(v, VOCABULARY)
            accept_len[row], bonus[row] = accept_sampled(drafted.tokens[row, :v], q, p, self._random)
        return accept_len, bonus

    def _output(self, drafts: Ints, accept_len: Ints, bonus: Ints) -> Ints:
        """Give accepted and bonus tokens to their requests; return how many each output, cut at the end of text."""
        output_len = np.empty_like(accept_len)
        for slot, request in enumerate(self._batch()):
            accepted, length = int(accept_len[slot]), int(self._lengths[slot])
            tokens = bytes(drafts[slot, :accepted].tolist()) + bytes((int(bonus[slot]),))
            end = tokens.find(END_OF_TEXT)
            if end >= 0:
                tokens = tokens[: end + 1]
            self._tokens[slot, length : length + len(tokens)] = list(tokens)
            request.output += tokens
            request.ended = end >= 0 or len(request.output) >= request.max_new_tokens
            output_len[slot] = len(tokens)
        return output_len

    # The draft's backlog, prefills and slots.

    def _catch_up(self, lengths: Ints) -> Tensor:
        """Run the draft over what it has not seen of the running requests; logits [b, 256] after their last tokens."""
        seen = self._draft_seen[: len(lengths)]
        unseen = lengths - seen
        ends = np.cumsum(unseen)
        slots = np.repeat(np.arange(len(lengths)), unseen)
        positions = np.arange(len(slots)) - np.repeat(ends - unseen, unseen) + np.repeat(seen, unseen)
        tokens = self._tokens[slots, positions]
        logits = []
        for begin in range(0, len(slots), self.draft.max_rows):
            end = min(begin + self.draft.max_rows, len(slots))
            last = ends[(ends > begin) & (ends <= end)] - 1 - begin
            at = PackedRows.of(self._draft_cache, slots[begin:end], positions[begin:end])
            wanted = None if len(last) == end - begin else self._device(last)
            logits.append(self.draft.forward(self._draft_cache, self._device(tokens[begin:end]), at, wanted))
        self._draft_seen[: len(lengths)] = lengths
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _set_batch(self, concurrency: int, most: int) -> None:
        held = self.tap.held_batch_size
        if held > most:
            held = 0
        wanted = held or concurrency
        if held and self.running > held:
            self.parked += self.running - held
            self.running = held
        resumed = min(self.parked, held - self.running) if held else self.parked
        self.running += resumed
        self.parked -= resumed
        while self.running < wanted and not self.parked and self.queue:
            self._admit(self.queue.popleft())

    def _admit(self, request: Request) -> None:
        slot, length = self.running, len(request.prompt)
        self._requests[slot] = request
        self._tokens[slot, :length] = np.frombuffer(request.prompt, dtype=np.uint8)
        self._lengths[slot], self._draft_seen[slot] = length, 0
        self.running += 1
        if length == 1:
            return
        self._prefill(self.target, self._target_cache, "target", slot, request.prompt)
        if self._last_k or (self._prefixes is not None and self._prefixes.get("draft", request.prompt) is not None):
            self._prefill(self.draft, self._draft_cache, "draft", slot, request.prompt)
            self._draft_seen[slot] = length - 1

    def _prefill(self, model: ByteModel, cache: KVCache, name: str, slot: int, prompt: bytes) -> None:  # type: ignore[type-arg]
        """Fill a slot with all of the prompt but its last token."""
        length = len(prompt) - 1
        saved = self._prefixes.get(name, prompt) if self._prefixes is not None else None
        if saved is not None:
            cache.restore(slot, saved)
            return
        for begin in range(0, length, model.max_rows):
            end = min(begin + model.max_rows, length)
            at = PackedRows.of(cache, np.full(end - begin, slot), np.arange(begin, end))
            none = torch.zeros(0, dtype=torch.int64, device=model.device)
            model.forward(cache, self._device(self._tokens[slot, begin:end]), at, none, dense=end - begin >= _DENSE_ROWS)
        if self._prefixes is not None:
            self._prefixes.put(name, prompt, cache.save(slot, length))

    def _release(self, slot: int) -> None:
        """Free a running slot; the last running and the last parked request close the gaps."""
        self.finished.append(self._request(slot))
        self.running -= 1
        if slot != self.running:
            self._move(self.running, slot)
        if self.parked:
            self._move(self.running + self.parked, self.running)
        self._requests[self.running + self.parked] = None

    def _move(self, source: int, target: int) -> None:
        self._target_cache.move(source, target, int(self._lengths[source]))
        self._draft_cache.move(source, target, int(self._draft_seen[source]))
        self._requests[target] = self._requests[source]
        for array in (self._tokens, self._lengths, self._draft_seen):
            array[target] = array[source]

    def _batch(self) -> list[Request]:
        return [self._request(slot) for slot in range(self.running)]

    def _request(self, slot: int) -> Request:
        request = self._requests[slot]
        if request is None:
            raise RuntimeError(f"slot {slot} holds no request")
        return request

    def _device(self, tokens: Ints) -> Tensor:
        return torch.from_numpy(tokens).to(self.target.device)

    def _synchronise(self) -> None:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize()


def _tempered(logits: Tensor, temperatures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Softmax of logits [n, v] / temperatures [n]; rows of temperature 0 are left at 1."""
    scaled = logits.double() / torch.from_numpy(np.where(temperatures > 0.0, temperatures, 1.0)).to(logits.device)[:, None]
    probabilities: NDArray[np.float64] = scaled.softmax(-1).cpu().numpy()
    return probabilities
