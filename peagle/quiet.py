"""Keeps from the output what libraries say and no user needs."""

import logging
import re
import sys

from transformers.utils import logging as transformers_logging

# Advertisements; a device nobody asked for; what takes no time.
NOISE = re.compile(r"Tip: |^TPU available|^Loading `train_dataloader` to estimate")


def is_needed(record: logging.LogRecord) -> bool:
    return not NOISE.search(record.getMessage())


def silence_libraries() -> None:
    """Drop Lightning's tips, and where nobody watches a terminal the bars of transformers."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(is_needed)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
