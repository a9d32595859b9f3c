"""`python -m genai_kernels <command>`."""

from .cli import main

raise SystemExit(main())
