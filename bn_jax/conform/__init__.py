"""Any batch norm on trial: vectors, a float64 oracle, and the names of known bugs."""
