"""The Learnable Task Vector."""
