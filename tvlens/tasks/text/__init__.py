"""Text tasks: pairs, and the prompts made of them."""
