"""What is declared: a signature becomes a schema, a shape line becomes a plan."""
