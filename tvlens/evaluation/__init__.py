"""What methods do on prompts, with intervals."""
