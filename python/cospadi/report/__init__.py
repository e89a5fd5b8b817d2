"""The report of a comparison: a CSV file and one self-contained HTML page, made from plain data alone."""
