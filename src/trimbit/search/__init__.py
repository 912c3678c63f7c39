"""Search methods: one a file, each returning a plan."""
