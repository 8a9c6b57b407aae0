"""What `projectors` is made of: reducers, projectors and position codes, a file for each kind."""
