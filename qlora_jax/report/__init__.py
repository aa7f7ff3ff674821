"""What a run, or a sweep's ledger, shows: read, compared, drawn, and put on one page."""
