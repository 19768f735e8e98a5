from adaptive_spec.engines.embedded.lossless import LosslessCheck, greedy_alone
from adaptive_spec.engines.embedded.quantised import ExactModel
from adaptive_spec.engines.embedded.requests import Request


def ended(target: ExactModel, wrong_at: int | None = None) -> tuple[Request, list[float]]:
    text, gaps = greedy_alone(target, b"some prompt", 20)
    output = bytearray(text)
    if wrong_at is not None:
        output[wrong_at] ^= 1
    return Request(1, b"some prompt", 20, output=output, ended=True), gaps


def test_the_targets_own_output_passes(target: ExactModel) -> None:
    check = LosslessCheck()
    assert check.check(target, ended(target)[0])
    assert (check.checked, check.equal, check.ties, check.lossless) == (1, 1, 0, True)


def test_one_wrong_byte_or_a_missing_end_is_seen(target: ExactModel) -> None:
    check = LosslessCheck()
    assert not check.check(target, ended(target, wrong_at=7)[0])
    short, _ = ended(target)
    del short.output[-1:]
    assert not check.check(target, short)
    assert (check.different, check.lossless) == (2, False)


def test_a_tie_is_no_excuse_on_the_cpu_and_one_elsewhere(target: ExactModel) -> None:
    request, gaps = ended(target, wrong_at=7)
    strict, lenient = LosslessCheck(), LosslessCheck(exact=False, tie_tolerance=gaps[7] * 1.01)
    sharp = LosslessCheck(exact=False, tie_tolerance=gaps[7] * 0.99)
    assert not strict.check(target, request)
    assert lenient.check(target, request)
    assert not sharp.check(target, request)
    assert (lenient.ties, lenient.lossless) == (1, True)
