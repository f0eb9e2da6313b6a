"""Loading without announcements: what transformers prints while it loads breaks into tables and progress."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


def _wanted(record: logging.LogRecord) -> bool:
    # Its image processors come in two kinds, of equal results for what is loaded here; all other warnings matter.
    return "requires torchvision" not in record.getMessage()


@contextmanager
def loading() -> Iterator[None]:
    """Without transformers' bar of weights, and its notice that torchvision is not installed."""
    try:
        from transformers.utils import logging as theirs
    except ImportError:
        yield
        return
    theirs.get_logger("transformers")  # its handlers are made at the first call
    handlers = list(logging.getLogger("transformers").handlers)
    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    for handler in handlers:
        handler.addFilter(_wanted)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_wanted)
        if shown:
            theirs.enable_progress_bar()
