"""Reports: a run, or several side by side, as one HTML file that needs nothing else."""

from cloud_aggregator.reports.build import build_report, write_report

__all__ = ["build_report", "write_report"]
