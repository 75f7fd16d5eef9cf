"""The page and the table about a sweep: its runs beside each other."""
