"""Faults of every kind against the real worker, broker and Redis, each run judged by the naive oracle."""
