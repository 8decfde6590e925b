"""The programs that measure: a package, so that no other `benchmark` is imported instead."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
