"""What a person sees while a run goes on and when it is done."""

from spalign.report.assess import assess_table
from spalign.report.judge import print_judge
from spalign.report.progress import Progress
from spalign.report.terminal import print_funnel, print_summary

__all__ = ["Progress", "assess_table", "print_funnel", "print_judge", "print_summary"]
