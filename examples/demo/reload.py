"""The new process that the demo starts: `python -m demo.reload demo-output`."""

import sys
from pathlib import Path

from .files import repeat_predictions
from .model import quieten_transformers

if __name__ == "__main__":
    quieten_transformers()
    repeat_predictions(Path(sys.argv[1]))
