"""The messages of diffusers and transformers, kept out of the way of ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from quantmatrix.quoting import limit_message


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own messages and bars out of the way of ours."""
    import diffusers
    import transformers

    loggers = (diffusers.utils.logging, transformers.utils.logging)
    before = [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, (level, bars) in zip(loggers, before, strict=True):
            logger.set_verbosity(level)
            if bars:
                logger.enable_progress_bar()


@contextmanager
def escaped() -> Iterator[None]:
    """Let diffusers say what it finds in a configuration, its names and values escaped and cut."""
    from diffusers.utils.logging import get_logger

    handlers = get_logger("diffusers").handlers
    for handler in handlers:
        handler.addFilter(_escape)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_escape)


def _escape(record: logging.LogRecord) -> bool:
    """Replace a record's text by its escaped form."""
    record.msg, record.args = limit_message(record.getMessage()), None
    return True
