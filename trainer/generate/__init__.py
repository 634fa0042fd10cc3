"""Pictures by a trained system."""
