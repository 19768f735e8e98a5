"""Configuration files of sidecar and plugins, and scenario files."""

from __future__ import annotations

import yaml

from adaptive_spec.config.load import load_settings, settings_from
from adaptive_spec.config.settings import SidecarSettings
from adaptive_spec.engines.simulated.scenario import load_scenario
from adaptive_spec.errors import BadInput
from tests.fuzz.target import FileTarget, one_line_of

CONFIGURATION = """\
runtime_dir: /run/adaptive-spec/run
profile_dir: profiles
host: 127.0.0.1
port: 9477
profile_store: s3://user:secret@bucket/profiles?sig=abc
grafana: {url: 'https://grafana.example:3000/g', token_file: /run/token}
controller:
  mode: shadow
  policy: {k_min: 0, k_max: 8, min_gain: 0.01, fallback: stock}
  latency: {jump_threshold: 0.15}
"""
SCENARIO = """\
name: fuzz
granularity: request
max_k: 2
duration_s: 5
latency: {verify_curve: [[8, 5.0], [16, 8.0]], token_buckets: [8, 16], noise: {sigma: 0.1}}
classes: {chat: {accept: [0.8, 0.7], concentration: 4}}
timeline: [{at_s: 0, running: [1, 4], mix: {chat: 1.0}}]
drift: [{at_s: 2, class: chat, score_bias: 0.5}]
"""


class YamlFiles(FileTarget):
    """The first byte: bit 0 whether it is a scenario. The rest is the file."""

    name = "yaml"
    longest = 1024

    def seeds(self) -> dict[str, bytes]:
        return {
            "configuration": b"\0" + CONFIGURATION.encode(), "scenario": b"\1" + SCENARIO.encode(), "empty": b"\0",
            "alias": b"\0a: &a [*a]\n", "deep": b"\0" + b"[" * 40, "date": b"\0port: 2020-01-01\n",
            "tag": b"\0!!binary aGk=: 1\n",
            "nul": b'\0host: "a\\0b"\n', "number": b"\0port: 0x" + b"f" * 60, "surrogate": b'\0host: "\\ud800"\n',
            "block": b"\0host: |\n  a\n  b\n? [1]\n: 2\n", "float": b"\1duration_s: .inf\n", "sexagesimal": b"\0port: 1:60:00\n",
            "binary_int": b"\0port: 0b1_0\n", "merge": b"\0<<: {port: 1}\n",
            "directive": b"\0%YAML 1.1\n%TAG ! x\n---\nport: 1\n",
        }  # fmt: skip

    def run(self, data: bytes) -> str:
        self.write(data[1:])
        try:
            if data[:1] and data[0] & 1:
                scenario = load_scenario(self.path)
                assert scenario.max_batch >= 1
                assert all(scenario.allowed_k(b) for b in (1, scenario.max_batch))
                return ""
            settings = load_settings(self.path)
        except BadInput as error:
            message = one_line_of(error)
            assert message.startswith(str(self.path)), message
            return message
        assert SidecarSettings.model_validate_json(settings.model_dump_json()) == settings
        written = yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json", exclude_unset=True)))
        assert settings_from(written or None, "again") == settings
        return ""
