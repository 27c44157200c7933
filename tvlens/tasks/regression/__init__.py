"""Function classes as tasks: points, and the prompts made of them."""
