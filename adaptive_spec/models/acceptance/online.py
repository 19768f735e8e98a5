"""Acceptance model: which draft tokens will be accepted, learnt from verified tokens only.

The label of draft position j is `j <= accept_len`, for the positions that were verified (others carry no label: counting
them as rejected would be censoring bias). Every sample is first predicted, then learnt (prequential, Dawid 1984), so the
scores are of unseen data. Of the candidate maps (`calibration_maps.py`) the one with the lowest forgetting log loss serves;
another must be better by `SWITCH_MARGIN` to replace it, so that ties do not alternate.

A draft token is scored when its confidence and those of all tokens before it are known. Scored tokens train the maps. Every
verified token counts in `conditional_rates`, which also predict the tokens that are not scored: without any confidence they are
the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from adaptive_spec.domain.arrays import Floats
from adaptive_spec.domain.step_record import UNKNOWN_CONFIDENCE, StepRecord
from adaptive_spec.domain.survival import GridPosition, SurvivalMap, grid_position
from adaptive_spec.models.acceptance.calibration_maps import GRID, RiverLogistic, ScoreHistogram, all_maps, rate_map
from adaptive_spec.models.acceptance.draft_imputation import RecentDrafts
from adaptive_spec.models.acceptance.position_counts import PositionCounts
from adaptive_spec.models.acceptance.reliability import BINS, Reliability
from adaptive_spec.models.plausible import LARGEST_WEIGHT, by_position, plausible

SWITCH_MARGIN = 0.002
RIVER_SAMPLES = 128
"""Labels per learnt chunk that River sees."""
MIN_LABELS = 20.0
"""Labels a position keeps, however long it has not been drafted."""
UNLABELLED = 400.0
"""Steps without a label after which nothing is known of a position, see `conditional_rates`."""
KINDS = ("chain", "logistic", "binned", "linear")


@dataclass(frozen=True)
class StepScore:
    """How one step compared with what was expected of it.

    tokens: verified draft tokens that were scored. expected, accepted: of these, draft tokens. variance: of accepted under
    the calibration. unscored: draft tokens expected to be accepted of the other verified ones, by the rates of their positions.
    """

    tokens: int
    expected: float
    accepted: int
    variance: float
    unscored: float = 0.0


class _Labels(NamedTuple):
    """Draft tokens of a chunk of steps, [rows, positions] each.

    known: the confidences up to this token are. verified, accepted. scored: both verified and known. score: cumulative.
    """

    known: NDArray[np.bool_]
    verified: NDArray[np.bool_]
    scored: NDArray[np.bool_]
    accepted: NDArray[np.bool_]
    score: Floats
    score_at: GridPosition
    confidence_at: GridPosition

    @classmethod
    def of(cls, confidences: NDArray[np.float32], verify_len: NDArray[np.int64], accept_len: NDArray[np.int64]) -> _Labels:
        positions = np.arange(confidences.shape[1])
        known = np.logical_and.accumulate(confidences > UNKNOWN_CONFIDENCE, axis=1)
        verified = positions < verify_len[:, None]
        score: Floats = np.cumprod(confidences, axis=1, dtype=np.float64)
        return cls(
            known,
            verified,
            verified & known,
            positions < accept_len[:, None],
            score,
            grid_position(score),
            grid_position(confidences),
        )


class AcceptanceModel:
    """Online calibration for draft positions 1..max_k.

    memory_steps: decode steps it remembers, > 1 (inf: forgets nothing).
    """

    def __init__(self, max_k: int, memory_steps: float) -> None:
        self.max_k = max_k
        self.decay = 1.0 - 1.0 / memory_steps
        self.cumulative = ScoreHistogram(max_k)
        self.at_risk = ScoreHistogram(max_k)
        self.unscored = PositionCounts(max_k)
        """Tokens at risk that are not in `at_risk` because they were not scored."""
        self.river = RiverLogistic(max_k)
        self.maps = dict(all_maps(self.cumulative, self.at_risk, self.river))
        self.losses = {kind: np.zeros(2) for kind in KINDS}
        """Forgetting (weight, sum of log losses) per map."""
        self.kind = KINDS[0]
        self._rate_map: SurvivalMap | None = None
        self.reliability = Reliability()
        self.samples = 0
        self.recent = RecentDrafts(max_k)
        self.steps = 0
        self.unlabelled_steps: Floats = np.zeros(max_k)
        """Decode steps since each position last had a label."""
        self._waiting: list[StepRecord] = []
        self.waiting_tokens = 0
        """Draft tokens of the queued steps."""
        self._river_turn = 0

    @property
    def survival(self) -> SurvivalMap:
        """The serving map: of the best kind, or of rates where most recent labels are of tokens that were not scored."""
        return self.maps[self.kind] if self._rate_map is None else self._rate_map

    def observe(self, record: StepRecord) -> None:
        """Queue one step; `learn` takes the queue in one vectorised pass."""
        self.steps += 1
        self.unlabelled_steps += 1.0
        if record.k:
            self._waiting.append(record)
            self.waiting_tokens += len(record.verify_len) * record.k
            self.unlabelled_steps[: int(record.verify_len.max())] = 0.0

    @property
    def waiting_steps(self) -> int:
        """Queued steps."""
        return len(self._waiting)

    def learn(self) -> list[StepScore]:
        """Predict, score, then learn every queued step; returns one StepScore per step, in order."""
        records, self._waiting, self.waiting_tokens = self._waiting, [], 0
        if not records:
            return []
        width = min(max(r.k for r in records), self.max_k)
        rows = sum(len(r.verify_len) for r in records)
        confidences = np.full((rows, width), 0.5, dtype=np.float32)
        drafted = np.zeros(rows, dtype=np.int64)
        starts, at = [], 0
        for record in records:
            n, k = len(record.verify_len), min(record.k, width)
            confidences[at : at + n, :k] = record.confidences[:, :k]
            drafted[at : at + n] = k
            starts.append(at)
            at += n
        verify_len = np.concatenate([r.verify_len for r in records]).astype(np.int64)
        accept_len = np.concatenate([r.accept_len for r in records]).astype(np.int64)
        labels = _Labels.of(confidences, verify_len, accept_len)
        self.recent.remember(confidences, np.minimum(drafted, labels.known.sum(axis=1)), self.steps)
        scores = self._score_maps(labels, starts)
        self._forget(self.decay ** len(records))
        self._add(labels)
        return scores

    def refit(self) -> None:
        """Refit every map and serve the one with the lowest prequential log loss."""
        self.maps = dict(all_maps(self.cumulative, self.at_risk, self.river))
        mostly_unscored = self.unscored.verified[:1].sum() > self.at_risk.verified[:1].sum()
        self._rate_map = rate_map(self.conditional_rates()[0]) if mostly_unscored else None
        mean = {kind: total / weight for kind, (weight, total) in self.losses.items() if weight > 0}
        if mean:
            best = min(mean, key=mean.__getitem__)
            if mean[best] < mean.get(self.kind, np.inf) - SWITCH_MARGIN:
                self.kind = best

    def discount_past(self, factor: float) -> None:
        """After drift: multiply the weight of all past labels by `factor`, 0..1, so that new ones count more."""
        self._forget(factor)
        for loss in self.losses.values():
            loss *= factor
        self.reliability.forget(factor)

    def conditional_rates(self) -> tuple[Floats, Floats]:
        """P(position j accepted | all before were), [max_k], and its standard error.

        The prior of each is the rate before it, with the weight of ten labels; of the first, one half. The error grows with the
        square root of the steps since a position last had a label: by 0.5 in 400 steps for the first, whose rate can take any
        value after the draft has changed; by at most 0.2 for the others, which are close to the one before them.
        """
        n = self.at_risk.verified.sum(1) + self.unscored.verified
        y = self.at_risk.accepted.sum(1) + self.unscored.accepted
        rates = np.empty(self.max_k)
        before = 0.5
        for j in range(self.max_k):
            before = rates[j] = (y[j] + 10.0 * before) / (n[j] + 10.0)
        known = np.sqrt(np.maximum(rates * (1.0 - rates), 0.02) / (n + 4.0))
        most = np.where(np.arange(self.max_k) == 0, 0.5, 0.2)
        return rates, np.hypot(known, most * np.sqrt(np.minimum(self.unlabelled_steps / 400.0, 1.0)))

    def recent_survival(self) -> Floats:
        """Calibrated survival of recent requests' drafts [rows <= 512, max_k]; rates from the first unknown one on."""
        rows = self.recent.rows(self.steps)
        known = ~np.isnan(rows)
        return self._continued(self.survival.survival(np.where(known, rows, 0.5).astype(np.float64)), known)

    def _continued(self, survival: Floats, known: NDArray[np.bool_]) -> Floats:
        """Continue survival [rows, k] by `conditional_rates` where it is not `known` [rows, k]: survival, changed in place."""
        if not known.all():
            rates, _ = self.conditional_rates()
            before: Floats = np.ones(len(survival))
            for j in range(survival.shape[1]):
                before = survival[:, j] = np.where(known[:, j], survival[:, j], before * rates[j])
        return survival

    def _score_maps(self, labels: _Labels, starts: Sequence[int]) -> list[StepScore]:
        """Score every map on labels it has not learnt. starts: first row of each step."""
        forget = self.decay ** len(starts)
        scored = labels.scored
        flat_label = labels.accepted[scored]
        for kind, survival in self.maps.items():
            predicted = survival.survival_at(labels.confidence_at if survival.conditional else labels.score_at)
            hit = np.where(labels.accepted, predicted, 1.0 - predicted)
            loss = -np.log(np.maximum(hit, 1e-6))
            loss *= scored
            total = self.losses[kind]
            total *= forget
            total += (len(flat_label), float(loss.sum()))
            if kind == self.kind:
                serving, serving_loss = predicted, loss
        self.reliability.forget(forget)
        self.reliability.add(serving[scored], labels.score[scored], flat_label, serving_loss[scored])
        expected = serving * scored
        # Survival of one request's positions is nested: Var(sum) = sum_j (2 j - 1) S_j - (sum_j S_j)^2.
        mean = expected.sum(1)
        odd = 2.0 * np.arange(1, expected.shape[1] + 1) - 1.0
        variance = np.maximum(expected @ odd - mean**2, 0.0)
        unscored = (self._continued(serving, labels.known) * (labels.verified & ~scored)).sum(1)
        columns = np.stack((scored.sum(1), mean, (labels.accepted & scored).sum(1), variance, unscored))
        sums = np.add.reduceat(columns, list(starts), axis=1)
        return [StepScore(int(t), float(e), int(a), float(v), float(u)) for t, e, a, v, u in sums.T]

    def _add(self, labels: _Labels) -> None:
        scored = labels.scored
        positions = np.broadcast_to(np.arange(scored.shape[1]), scored.shape)
        score_index = labels.score_at.nearest
        self.cumulative.add(positions[scored], score_index[scored], labels.accepted[scored])
        at_risk = labels.verified.copy()
        at_risk[:, 1:] &= labels.accepted[:, :-1]
        self.unscored.add(at_risk & ~scored, labels.accepted)
        at_risk &= scored
        self.at_risk.add(positions[at_risk], labels.confidence_at.nearest[at_risk], labels.accepted[at_risk])
        self.samples += int(labels.verified.sum())
        chosen = np.flatnonzero(scored)
        if len(chosen) > RIVER_SAMPLES:
            # A fixed stride from a moving start: deterministic, and it visits every position.
            self._river_turn += 1
            stride = len(chosen) // RIVER_SAMPLES
            chosen = chosen[self._river_turn % stride :: stride][:RIVER_SAMPLES]
        x = GRID[score_index.ravel()[chosen]]
        self.river.learn(positions.ravel()[chosen], x, labels.accepted.ravel()[chosen])

    def _forget(self, factor: float) -> None:
        self.cumulative.forget(factor, MIN_LABELS)
        self.at_risk.forget(factor, MIN_LABELS)
        self.unscored.forget(factor, MIN_LABELS)

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Arrays of `calibration.npz`."""
        return {
            "cumulative": self.cumulative.state(),
            "at_risk": self.at_risk.state(),
            "unscored": self.unscored.state(),
            "river": self.river.coefficients(),
            "losses": np.stack([self.losses[kind] for kind in KINDS]),
            "serving": np.array([float(KINDS.index(self.kind))]),
            "reliability": np.stack((self.reliability.by_prediction, self.reliability.by_score)),
            "totals": self.reliability.totals.copy(),
            "samples": np.array([float(self.samples)]),
            "unlabelled_steps": self.unlabelled_steps.copy(),
            "survival": self.survival.table.astype(np.float64),
            **self.recent.state(),
        }

    def restore(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Take over `state()`, also of a model with another max_k: positions beyond are left out, missing ones have no labels.

        Raises ValueError, and changes nothing, when it cannot be a state.
        """
        n = self.max_k
        fresh = AcceptanceModel(n, 2.0)
        fresh.cumulative.restore(by_position(state["cumulative"], 1, n, 0.0))
        fresh.at_risk.restore(by_position(state["at_risk"], 1, n, 0.0))
        if "unscored" in state:  # absent from profiles of earlier versions
            fresh.unscored.restore(by_position(state["unscored"], 1, n, 0.0))
        unlabelled = state.get("unlabelled_steps", np.zeros(n))  # absent as above
        unlabelled = plausible("unlabelled_steps", by_position(unlabelled, 0, n, UNLABELLED), (n,), 0.0, LARGEST_WEIGHT)
        known = np.array(state["river"], dtype=np.float64)[:n]
        fresh.river.restore(np.concatenate((known, np.tile([0.0, 1.0], (n - len(known), 1)))))
        recent = {"recent": by_position(state["recent"], 1, n, np.nan), "decks": by_position(state["decks"], 0, n, np.nan)}
        fresh.recent.restore(recent)
        losses = plausible("losses", state["losses"], (len(KINDS), 2), 0.0, LARGEST_WEIGHT)
        reliability = plausible("reliability", state["reliability"], (2, 3, BINS), 0.0, LARGEST_WEIGHT)
        totals = plausible("totals", state["totals"], (3,), 0.0, LARGEST_WEIGHT)
        samples = plausible("samples", state["samples"], (1,), 0.0, LARGEST_WEIGHT)
        serving = int(plausible("serving", state["serving"], (1,), 0.0, len(KINDS) - 1)[0])
        self.cumulative, self.at_risk, self.river, self.recent = fresh.cumulative, fresh.at_risk, fresh.river, fresh.recent
        self.unscored = fresh.unscored
        self.losses = {kind: np.array(row, dtype=np.float64) for kind, row in zip(KINDS, losses, strict=True)}
        self.kind, self.samples = KINDS[serving], int(samples[0])
        self.reliability.by_prediction, self.reliability.by_score = (np.array(table) for table in reliability)
        self.reliability.totals = totals
        self.unlabelled_steps = unlabelled.copy()
        self.steps = 0
        self._waiting, self.waiting_tokens = [], 0
        self.refit()
