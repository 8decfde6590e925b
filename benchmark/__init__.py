"""The programs that measure: a package, so that no other `benchmark` is imported instead."""
