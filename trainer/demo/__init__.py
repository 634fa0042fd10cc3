"""A page to play with a trained system in a browser."""
