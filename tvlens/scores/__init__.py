"""A number for every part of the model, and how far two such scores agree."""
