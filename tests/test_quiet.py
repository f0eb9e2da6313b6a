"""Models load without announcements, and what was set before stays."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from transformers.utils import logging as theirs

from steersman import quiet


@pytest.mark.parametrize(
    "load",
    [
        "from steersman.reference import scenes; scenes.pipeline()",
        "from steersman.reference import reviews; reviews.language_model(); reviews.value_model()",
    ],
)
def test_reference_models_load_without_announcements(load):
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("shown", [True, False])
def test_transformers_is_left_as_it_was(shown):
    handlers = logging.getLogger("transformers").handlers
    before, filters = theirs.is_progress_bar_enabled(), [list(h.filters) for h in handlers]
    try:
        (theirs.enable_progress_bar if shown else theirs.disable_progress_bar)()
        with pytest.raises(OSError), quiet.loading():
            assert not theirs.is_progress_bar_enabled()
            raise OSError
        assert theirs.is_progress_bar_enabled() == shown
        assert [list(h.filters) for h in handlers] == filters
    finally:
        (theirs.enable_progress_bar if before else theirs.disable_progress_bar)()


def test_other_warnings_of_transformers_are_shown():
    shown: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record):
            shown.append(record.getMessage())

    logger, kept = theirs.get_logger("transformers.some"), Kept()
    logging.getLogger("transformers").addHandler(kept)
    try:
        with quiet.loading():
            logger.warning("`A` requires torchvision (not installed); falling back to `B`")
            logger.warning("weights are missing")
    finally:
        logging.getLogger("transformers").removeHandler(kept)
    assert shown == ["weights are missing"]
