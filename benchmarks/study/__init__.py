"""The naive ways that the G-Meta study compares gmeta with, as parts that plug into the trainer."""
