"""The three adapters that the demo compares: attaching, counting, saving and loading them."""

from __future__ import annotations
