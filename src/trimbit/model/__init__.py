"""What is known of the model: families, layout, and reading the original weights."""
