"""The whole method, in order, on disk."""

from spalign.pipeline.run import STAGES, Outcome, run

__all__ = ["STAGES", "Outcome", "run"]
