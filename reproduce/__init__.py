"""What is specific to the paper: published values, which run fills which cell, tables, figures, report."""
