"""What every experiment shares: cells that resume, models, quality, measured processes, tables, the command line."""
