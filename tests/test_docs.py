"""The documentation site builds without a warning, and every page can be reached."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from steersman import catalog

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_method_has_a_page_with_its_evidence(site):
    for card in catalog.cards().values():
        page = (site / "methods" / card.id / "index.html").read_text()
        assert "<!-- evidence -->" not in page
        assert f"{card.id}.svg" in page, f"no plot for {card.id}: make evidence METHODS={card.id}"
        assert (site / "methods" / f"{card.id}.svg").stat().st_size > 1000
        assert re.search(r"\b(holds|fails|not shown)\b", page)
        assert card.paper["url"] in page


def test_every_method_s_object_is_in_the_api(site):
    for card in catalog.cards().values():
        page = (site / "api" / card.room / "index.html").read_text()
        module, _, name = card.object.partition(":")
        assert f'id="{module}.{name}"' in page
