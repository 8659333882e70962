def row(report, kind="b"):
    """The row of one arm."""
    return next(row for row in report["rows"] if row["kind"] == kind)
