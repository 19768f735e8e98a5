import torch

from adaptive_spec.engines.embedded.requests import PrefixCache


def test_the_least_recently_used_prefix_leaves_first() -> None:
    prefixes = PrefixCache(max_bytes=1000)
    kept = {name: torch.zeros(100) for name in ("a", "b")}
    for name, tensor in kept.items():
        prefixes.put("target", name.encode(), tensor)
    assert prefixes.get("target", b"a") is kept["a"]
    prefixes.put("target", b"c", torch.zeros(100))
    assert prefixes.get("target", b"b") is None
    assert prefixes.get("target", b"a") is kept["a"]
    assert prefixes.get("draft", b"a") is None


def test_the_same_prefix_is_counted_once() -> None:
    prefixes = PrefixCache(max_bytes=1000)
    for _ in range(5):
        prefixes.put("target", b"a", torch.zeros(100))
        prefixes.put("target", b"b", torch.zeros(100))
    assert prefixes.get("target", b"a") is not None
    assert prefixes.get("target", b"b") is not None
