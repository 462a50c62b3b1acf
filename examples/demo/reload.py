"""The new process that the demo starts: `python -m demo.reload demo-output bfloat16`."""

import sys
from pathlib import Path

import torch
from transformers.utils import logging

from .files import repeat_predictions

if __name__ == "__main__":
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    repeat_predictions(Path(sys.argv[1]), sys.argv[2] == "bfloat16")
