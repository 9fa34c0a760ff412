"""What a run says about itself: one HTML file that needs nothing else."""

from lingshu_rl.report.html import write_report

__all__ = ["write_report"]
