"""Importing the libraries that train without what they say of kernels that are not used here."""

from __future__ import annotations

import importlib
import logging


def import_quietly(*modules: str) -> None:
    """Import transformers and more modules; their notices are kept back, now and later.

    Raises:
        ImportError: If one is not installed.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import transformers
        from transformers import GPT2LMHeadModel  # noqa: F401 - its imports are the talkative ones

        for module in modules:
            importlib.import_module(module)
    finally:
        logging.disable(before)
    transformers.logging.set_verbosity_error()
