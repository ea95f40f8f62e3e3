"""The laboratory: does learning faster along a few directions reach a target sooner? Studies and their verdicts."""
