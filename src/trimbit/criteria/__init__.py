"""What a method knows about importance: one criterion a file."""
