"""One self-contained HTML page about a looped model on some prompts."""

from tl_loops.report.page import (
    MOST_BYTES,
    ReportPrompts,
    default_prompts,
    report_html,
    write_report,
)

__all__ = ["MOST_BYTES", "ReportPrompts", "default_prompts", "report_html", "write_report"]
