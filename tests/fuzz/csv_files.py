"""CSV files of `adaptive-spec fit`."""

from __future__ import annotations

import csv
import io

import numpy as np

from adaptive_spec.errors import BadInput
from adaptive_spec.offline.samples import MAX_NUM_TOKENS, read_calibration, read_latency
from tests.fuzz.target import FileTarget, one_line_of


class CsvFiles(FileTarget):
    """The first byte: bit 0 the kind of file. The rest is the file."""

    name = "csv"
    longest = 1024

    def seeds(self) -> dict[str, bytes]:
        latency = b"num_tokens,latency_ms\n# comment\n" + b"".join(b"%d,%d.5\n" % (n, 10 + n // 8) for n in range(1, 25))
        pairs = b"cumulative_score,accepted\n" + b"".join(b"0.%d,%d\n" % (n % 9 + 1, n % 2) for n in range(30))
        return {
            "latency": b"\0" + latency, "pairs": b"\1" + pairs,
            "quoted": b'\0"num_tokens","latency_ms"\r\n"1", 1e-3 \r\n', "bom": b"\0\xef\xbb\xbfnum_tokens,latency_ms\n1,2\n",
            "huge": b"\0num_tokens,latency_ms\n1,1e308\n65536,1e-308\n2,1\n", "nul": b"\0num_tokens,latency_ms\n1\0,2\n",
            "digits": "\0num_tokens,latency_ms\n\u0663,1_0\n".encode(), "nan": b"\0num_tokens,latency_ms\n1,nan\n",
        }  # fmt: skip

    def run(self, data: bytes) -> str:
        kind = data[0] if data else 0
        self.write(data[1:])
        try:
            if kind & 1:
                self._pairs()
            else:
                self._latency()
        except BadInput as error:
            return one_line_of(error)
        return ""

    def _latency(self) -> None:
        samples = read_latency(self.path)
        tokens, latency_s = samples
        assert len(tokens) == len(latency_s) > 0
        assert tokens.min() >= 1
        assert tokens.max() <= MAX_NUM_TOKENS
        assert latency_s.min() >= 1e-9 * (1 - 1e-12)
        assert latency_s.max() <= 3600
        self.write(
            _table("num_tokens,latency_ms", [(int(t), repr(float(s * 1e3))) for t, s in zip(tokens, latency_s, strict=True)])
        )
        again = read_latency(self.path)
        assert (again.num_tokens == tokens).all()
        np.testing.assert_allclose(again.latency_s, latency_s, rtol=1e-12)

    def _pairs(self) -> None:
        pairs = read_calibration(self.path)
        score, accepted = pairs
        assert len(score) == len(accepted) > 0
        assert (score > 0).all()
        assert (score <= 1).all()
        assert set(accepted.tolist()) <= {0, 1}
        self.write(_table("cumulative_score,accepted", [(repr(float(p)), int(a)) for p, a in zip(score, accepted, strict=True)]))
        again = read_calibration(self.path)
        assert (again.cumulative_score == score).all()
        assert (again.accepted == accepted).all()


def _table(header: str, rows: list[tuple[object, object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([header.split(","), *rows])
    return text.getvalue().encode()
