"""`python -m rank_experts.demo`."""

from . import main

raise SystemExit(main())
