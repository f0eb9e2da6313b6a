"""The README says what the cards say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_table_of_methods_is_the_cards():
    render = runpy.run_path(str(ROOT / "docs" / "render.py"))
    text = (ROOT / "README.md").read_text()
    assert render["readme"](text) == text, "run make readme"


def test_every_picture_and_page_that_is_linked_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
