"""Configuration files that were made to do harm: each is one line, soon, and shows no secret."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adaptive_spec.config.load import load_settings, sections
from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.config.shown import hide, secrets_of, shown_value, url_without_secrets
from adaptive_spec.config.yaml_file import CONFIG_BYTES, DEEPEST
from adaptive_spec.errors import BadInput

LONGEST_LINE = 2000
SLOWEST_S = 20.0
"""Of processor time for one file; about 1 s alone on a core, PyYAML reads some 100 KB/s."""
ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "config.yaml"


def _refused(path: Path, data: bytes) -> str | None:
    """The message when the file is refused, None when it is taken; whatever else is raised fails the test."""
    path.write_bytes(data)
    begun_s = time.process_time()
    try:
        loaded = load_settings(path)
    except BadInput as error:
        message = str(error)
        assert message.isprintable(), "one line"
        assert len(message) < LONGEST_LINE
        assert message.startswith(f"{path}: ")
        return message
    finally:
        assert time.process_time() - begun_s < SLOWEST_S
    assert SidecarSettings.model_validate_json(loaded.model_dump_json()) == loaded
    return None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ALIASES, "line 1: not valid YAML: anchors and aliases are not allowed"),
        ("a: &a [*a]", "anchors and aliases are not allowed"),
        ("&a host: x", "anchors and aliases are not allowed"),
        ("!!binary aGk=: 1", "tags are not allowed"),
        ("!!bool maybe", "tags are not allowed"),
        ("2020-01-01: 1", "2020-01-01: unknown key"),
        ("host: 2020-01-01 00:00:00", "host: must be a host name"),
        ("~: 1", "line 1: not valid YAML: a key must be a text"),
        ("[1]: 2", "a key must be a text"),
        ("port: " + "[" * 100_0 + "]" * 100_0, f"must be at most {DEEPEST} levels deep"),
        ("- " * 1000, f"must be at most {DEEPEST} levels deep"),
        ("port: " + "9" * 5000, "a number must be at most 40 characters long"),
        ("port: 0x" + "f" * 5000, "a number must be at most 40 characters long"),
        ("port: " + "9:" * 5000 + "9", "a number must be at most 40 characters long"),
        ("port: =", "not valid YAML"),
        ("host: a\x00b", "not valid YAML"),
        (r'host: "a\0b"', r"host: must be a host name"),
        (r'host: "\ud800"', "host: must be Unicode text"),
        (r'"\ud800": 1', "must be Unicode text"),
        (r'runtime_dir: "/a\0b"', r"runtime_dir: must be a path of printable characters"),
        (r'control_token_file: "\n"', "must be a path of printable characters"),
        ("runtime_dir: /", "runtime_dir: must be a folder below /"),
        ("runtime_dir: /tmp/..", "runtime_dir: must be a folder below /"),
        ("profile_dir: //", "profile_dir: must be a folder below /"),
        ("runtime_dir: ''", "runtime_dir: must be not empty"),
        (f"runtime_dir: /{'x' * 300}", "must be at most 1024 bytes long, 255 a name"),
        ("host: a b", "host: must be a host name or an IP address"),
        ("host: a..b", "must be a host name or an IP address"),
        (f"host: {'a' * 64}.example", "must be a host name or an IP address"),
        ("host: '[::1]'", "must be a host name or an IP address"),
        ("host: http://x", "must be a host name or an IP address"),
        ('profile_store: "s3://bucket/\\n"', "profile_store: must be a URL"),
        ("grafana: {url: 'http://[::1'}", "grafana.url: must be like https://HOST:PORT/PREFIX"),
        ("grafana: {url: 'ftp://x'}", "must be like https://HOST:PORT/PREFIX"),
        ("grafana: {url: 'http://x:99999'}", "must be like https://HOST:PORT/PREFIX"),
        ("x" * (CONFIG_BYTES + 1), f"cannot be read: longer than {CONFIG_BYTES} bytes"),
        (f"{'k' * 500}: 1", f"{'k' * 120}...: unknown key"),
        ('"a\\nb": 1', r"'a\nb': unknown key"),
    ],
    ids=range(38),
)  # fmt: skip
def test_hostile_configuration_is_one_line(path: Path, text: str, words: str) -> None:
    message = _refused(path, text.encode())
    assert message is not None
    assert words in message


def test_aliases_take_no_memory(path: Path) -> None:
    """In a process that may not take more than 1 GB: 420 bytes of aliases are 43 million values."""
    path.write_text(ALIASES)
    code = "import sys; from pathlib import Path; from adaptive_spec.config.load import load_settings\n"
    code += "load_settings(Path(sys.argv[1]))"

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, path],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=bound,
        env=environment,
        check=False,
    )
    assert "BadInput" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", ["fifo", "device", "link to a device"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(BadInput, match="cannot be read: not a regular file"):
        load_settings(path)


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    """As a ConfigMap is mounted."""
    (tmp_path / "data.yaml").write_text("port: 1")
    (tmp_path / "config.yaml").symlink_to("data.yaml")
    assert load_settings(tmp_path / "config.yaml").port == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"host": " "}, "command line: host: must be a host name or an IP address, got ' '"),
        ({"runtime_dir": Path("/")}, "command line: runtime_dir: must be a folder below /, got '/'"),
        ({"port": 70_000}, "command line: port: must be at most 65535, got 70000"),
    ],
)
def test_options_are_checked_as_the_file_is(overrides: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput) as error:
        load_settings(None, overrides)
    assert words in str(error.value)


SECRETS = [
    "s3://AKIAKEY:se/cr+et@bucket/profiles",
    "simplecache::s3://user:hunter22@bucket/profiles",
    "filecache::https://host/p?sig=hunter22&se=2030",
    "abfs://container@account/p;AccountKey=hunter22",
    "https://host/p#hunter22",
    "user:p@hunter22@host",
    "s3://user:hunter22 @bucket",
]


@pytest.mark.parametrize("url", SECRETS)
def test_no_secret_of_a_url_is_shown(path: Path, url: str) -> None:
    assert not any(secret in url_without_secrets(url) for secret in ("hunter22", "AKIAKEY", "se/cr"))
    said = hide(f"cannot reach {url}, {url.partition('://')[2]}", secrets_of(url))
    assert not any(secret in said for secret in ("hunter22", "AKIAKEY:", "se/cr")), said
    for text in (f"{{profile_store: ['{url}']}}", f"{{profile_store: '{url}\\n'}}", f'{{profile_store: "{url}\\n"}}',
                 f"{{grafana: {{url: '{url}'}}}}", f"{{host: '{url}'}}", f"{{runtime_dir: {{x: '{url}'}}}}"):  # fmt: skip
        message = _refused(path, text.encode()) or ""
        assert not any(secret in message for secret in ("hunter22", "AKIAKEY", "se/cr")), text


def test_what_is_no_secret_is_shown() -> None:
    for url in ("file:///mnt/profiles", "s3://bucket/profiles", "simplecache::s3://bucket/a", "/mnt/x"):
        assert url_without_secrets(url) == url
        assert shown_value(url) == repr(url)


@given(st.binary(max_size=400))
@example(b"")
@example(b"\xff\xfe")
def test_arbitrary_bytes(path: Path, data: bytes) -> None:
    _refused(path, data)


YAML_SIGNS = st.sampled_from(
    [*"{}[]:,-?&*!|>'\"%@`#=~<\n \t0aZ.", "\ud7ff", "\x85", "\u2028", "---\n", "...\n", "<<: ", "port: ", "host: "]
)


@given(st.lists(YAML_SIGNS, max_size=80).map("".join))
def test_arbitrary_yaml_signs(path: Path, text: str) -> None:
    _refused(path, text.encode())


KEYS = sorted({name for _, section in sections(SidecarSettings) for name in section.model_fields})
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(10**60), 10**60), st.floats(), st.text(max_size=20), st.dates(),
    st.datetimes(), st.binary(max_size=9), st.sampled_from(["active", "info", "/", "s3://a:b@c/d", "http://x"]),
)  # fmt: skip
ANY_KEY = st.sampled_from(KEYS) | st.text(max_size=5) | st.dates()
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_KEY, inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(DOCUMENTS)
def test_arbitrary_documents(path: Path, document: object) -> None:
    with contextlib.suppress(UnicodeEncodeError):
        _refused(path, yaml.safe_dump(document, allow_unicode=True).encode())


def _keys() -> Iterator[str]:
    for prefix, section in sections(SidecarSettings):
        yield from (f"{prefix}{name}" for name in section.model_fields)


@pytest.mark.parametrize("key", list(_keys()))
@settings(max_examples=25)
@given(value=SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=4), SCALARS, min_size=1, max_size=2))
def test_every_value_of_every_key(path: Path, key: str, value: object) -> None:
    document: Any = value
    for part in reversed(key.split(".")):
        document = {part: document}
    with contextlib.suppress(UnicodeEncodeError):
        message = _refused(path, yaml.safe_dump(document, allow_unicode=True).encode())
        assert message is None or key in message or "YAML" in message


@pytest.mark.parametrize(
    "data",
    [b"[" * CONFIG_BYTES, b"a: " + b"x " * (CONFIG_BYTES // 2 - 2), b"? " * (CONFIG_BYTES // 2), b"#" * CONFIG_BYTES,
     b"\n" * CONFIG_BYTES, b"'" * CONFIG_BYTES, b"[" + b"1," * (CONFIG_BYTES // 2 - 1), b"{" + b"a," * (CONFIG_BYTES // 2 - 1),
     b"".join(b"k%d: 1\n" % i for i in range(4000))],
    ids=["[", "words", "?", "#", "lines", "quotes", "list", "twice", "keys"],
)  # fmt: skip
def test_the_longest_files_take_bounded_time(path: Path, data: bytes) -> None:
    _refused(path, data[:CONFIG_BYTES])
