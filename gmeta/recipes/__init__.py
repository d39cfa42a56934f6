"""Recipes: which model and settings `gmeta train` takes for a pack where no model is named, and why."""
