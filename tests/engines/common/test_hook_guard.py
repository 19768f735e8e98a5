from __future__ import annotations

from typing import Any

import pytest

from adaptive_spec.engines.common.hook_guard import FAILURES_IN_A_ROW, Guard


def _original(calls: list[Any]) -> Any:
    def original(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "result"

    return original


def _raise(*args: Any, **kwargs: Any) -> None:
    raise ValueError("ours")


def test_note_and_result_reach_the_second_half() -> None:
    seen: list[Any] = []
    guard, calls = Guard("SGLang", ""), list[Any]()
    hook = guard.around("draft", lambda a, b: a + b, lambda note, result, a, b: seen.append((note, result, a, b)))
    assert hook(_original(calls), 1, b=2) == "result"
    assert calls == [((1,), {"b": 2})]
    assert seen == [(3, "result", 1, 2)]


@pytest.mark.parametrize(("before", "after"), [(_raise, None), (None, _raise), (_raise, _raise)])
def test_a_failing_hook_does_not_fail_the_call(before: Any, after: Any) -> None:
    guard, calls = Guard("SGLang", ""), list[Any]()
    assert guard.around("draft", before, after)(_original(calls), 1) == "result"
    assert calls == [((1,), {})], "called exactly once"
    assert guard.failures == {"draft": 1}


def test_an_exception_of_the_original_is_raised_and_not_counted() -> None:
    guard = Guard("SGLang", "")
    with pytest.raises(KeyError):
        guard.around("draft", None, None)(lambda: {"a": 1}["x"])
    assert not guard.failures


def test_failures_in_a_row_close_the_guard() -> None:
    told: list[str | None] = []
    guard, calls = Guard("SGLang", ""), list[Any]()
    guard.on_close = lambda: told.append(guard.closed)
    fails = [True]
    hook = guard.around("draft", lambda: _raise() if fails[0] else None, None)
    for _ in range(FAILURES_IN_A_ROW - 1):
        hook(_original(calls))
    fails[0] = False
    hook(_original(calls))
    assert guard.closed is None, "one successful call resets the count"
    fails[0] = True
    for _ in range(3 * FAILURES_IN_A_ROW):
        hook(_original(calls))
    assert told == [f"hook draft failed {FAILURES_IN_A_ROW} times in a row"]
    assert guard.failures["draft"] == 2 * FAILURES_IN_A_ROW - 1, "nothing of ours is called any more"
    assert len(calls) == 4 * FAILURES_IN_A_ROW


def test_one_failure_while_the_server_starts_is_final() -> None:
    guard = Guard("SGLang", "attach")
    assert guard.around("attach", None, None)(_original([])) == "result"
    assert guard.closed == "hook attach failed while the server started"


@pytest.mark.parametrize("name", ["draft", "draft/after"])
def test_faults_can_be_injected(name: str) -> None:
    guard, calls = Guard("SGLang", f"verify, {name}"), list[Any]()
    assert guard.around("draft", None, lambda *_: None)(_original(calls)) == "result"
    assert guard.failures == {"draft": 1}
    assert len(calls) == 1


def test_what_comes_first_is_called_whatever_fails() -> None:
    guard, called = Guard("SGLang", "step"), list[str]()
    hook = guard.around("step", lambda: called.append("before"), None, lambda: called.append("first"))
    hook(_original([]))
    assert called == ["first"], "the hook itself failed"
    guard.close("enough")
    hook(_original([]))
    assert called == ["first"] * 2


def test_a_failure_of_what_comes_first_is_counted() -> None:
    guard, calls = Guard("SGLang", ""), list[Any]()
    assert guard.around("step", None, None, lambda: _raise())(_original(calls)) == "result"
    assert guard.failures == {"step": 1}
    assert len(calls) == 1


def test_a_part_that_always_fails_ends_its_group_though_others_of_the_same_hook_succeed() -> None:
    guard = Guard("vLLM", "")
    guard.groups, guard.optional = {"greedy": "confidences"}, ("confidences",)

    def look() -> None:
        raise ValueError("other logits")

    def take() -> int:
        return 1

    for _ in range(FAILURES_IN_A_ROW - 1):
        assert guard.part("greedy", look) is None
        assert guard.part("greedy", take) == 1
    assert guard.lost == {}
    guard.part("greedy", look)
    assert "confidences" in guard.lost
    assert guard.part("greedy", take) is None, "its hooks are no longer called"
    assert guard.closed is None
    assert guard.failures["greedy"] == FAILURES_IN_A_ROW
