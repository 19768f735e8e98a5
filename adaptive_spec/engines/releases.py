"""Which releases of an engine a plugin hooks into, from the version string alone."""

from __future__ import annotations

import re
from collections.abc import Collection

_VERSION = re.compile(
    r"v?(?P<release>\d+(?:\.\d+)*(?:\.?post\d+)?)(?P<pre>\.?(?:a|b|c|rc|alpha|beta|pre)\.?\d*)?(?P<dev>\.?dev\d*)?(?:\+(?P<local>.*))?"
)


def release_of(version: str) -> str | None:
    """The release a version string stands for, without a local suffix: "0.5.23+cu130" -> "0.5.23".

    None for a development build or a pre-release ("0.5.24.dev3+g1a2b3c", "0.5.24rc1"), and for what is no version.
    """
    match = _VERSION.fullmatch(version.strip().lower())
    return None if match is None or match["pre"] or match["dev"] else match["release"]


def version_refusal(engine: str, version: str, supported: Collection[str], way_out: str) -> str | None:
    """Why a plugin does not hook into this version, None if it does. One line.

    engine: its name. supported: releases, in order. way_out: what lifts the gate, for example "VARIABLE=1".
    """
    release = release_of(version)
    if release in supported:
        return None
    match = _VERSION.fullmatch(version.strip().lower())
    if release is not None:
        kind = "is not a supported release"
    elif match is not None:
        kind = "is a development build or pre-release, and those are not supported"
    else:
        kind = "is not a known version"
    return f"{engine} {version} {kind} (supported: {', '.join(supported)}); {way_out} tries it"
