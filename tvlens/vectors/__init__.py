"""What is added to the residual stream, method by method."""
