"""The page of one run as one file, which needs no server and no network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from hpcresume.display.web.assets import LIBRARY, MODULES, PAGE, STYLES, load_assets

_IMPORT = re.compile(r"^import [^;]*;\n", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class|let)\b)", re.MULTILINE)


def html_report(shown: Mapping[str, Any]) -> str:
    """The page with a run's picture in it. Scripts and styles are allowed by their hashes only."""
    assets = load_assets()
    styles = "".join(assets[name].text for name in STYLES)
    # Browsers load no modules from files: ours become one, in the order of their imports.
    modules = "".join(_EXPORT.sub("", _IMPORT.sub("", assets[name].text)) for name in MODULES)
    library = assets[LIBRARY].text
    data = json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hashed(styles)}; "
        f"script-src {_hashed(library)} {_hashed(modules)}; base-uri 'none'; form-action 'none'"
    )
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{styles}</style>'
    )
    body = (
        f'<script type="application/json" id="data">{data}</script>\n'
        f"<script>{library}</script>\n"
        f'<script type="module">{modules}</script>'
    )
    page = assets[PAGE].text
    for name, new in (("head", head), ("body", body)):
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        first, last = page.index(begin), page.index(end)
        page = page[:first] + new + page[last + len(end) :]
    return page


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
