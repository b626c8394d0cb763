"""What a person sees: progress while it runs, and the facts at the end."""

from spalign.report.progress import Progress
from spalign.report.terminal import print_summary

__all__ = ["Progress", "print_summary"]
