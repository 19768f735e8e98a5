import itertools

import pytest

from adaptive_spec.engines.embedded.load import PromptSource, phases

PROMPTS = {"prose": [b"a", b"b", b"c"], "code": [b"x", b"y"]}


def test_concurrency_varies_and_the_kind_changes_half_way() -> None:
    walk = list(itertools.takewhile(lambda p: p.ends_s <= 40.0, phases(40.0, (1, 4, 16), phase_s=4.0)))
    assert [p.concurrency for p in walk] == [1, 4, 16, 1, 4, 16, 1, 4, 16, 1]
    assert [p.kind for p in walk] == ["prose"] * 5 + ["code"] * 5
    assert [p.ends_s for p in walk] == [4.0 * i for i in range(1, 11)]


def test_without_a_duration_the_kinds_alternate() -> None:
    kinds = [p.kind for p in itertools.islice(phases(None, (1, 2), phase_s=10.0, kind_s=30.0), 9)]
    assert kinds == ["prose"] * 3 + ["code"] * 3 + ["prose"] * 3


def test_the_kind_stays_changed_when_the_run_goes_on_longer() -> None:
    assert {p.kind for p in itertools.islice(phases(10.0, (1,), phase_s=2.0), 3, 12)} == {"code"}


def test_traffic_is_seeded_and_uses_every_prompt_before_one_comes_again() -> None:
    a, b, other = PromptSource(PROMPTS, 1), PromptSource(PROMPTS, 1), PromptSource(PROMPTS, 2)
    first = [a.prompt("prose") for _ in range(12)]
    assert first == [b.prompt("prose") for _ in range(12)]
    assert first != [other.prompt("prose") for _ in range(12)]
    assert all(sorted(first[i : i + 3]) == PROMPTS["prose"] for i in range(0, 12, 3))


def test_requests_have_ids_of_their_own() -> None:
    source = PromptSource(PROMPTS, 1, max_new_tokens=9)
    made = [source.request("code"), source.request("prose"), source.request("code", b"given")]
    assert [r.request_id for r in made] == [1, 2, 3]
    assert [r.kind for r in made] == ["code", "prose", "code"]
    assert made[2].prompt == b"given"
    assert all(r.max_new_tokens == 9 for r in made)


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(KeyError):
        PromptSource(PROMPTS, 1).prompt("verse")
