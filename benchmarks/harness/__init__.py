"""What all experiments share: resumable cells, models, quality, measured processes, tables and the command line."""
