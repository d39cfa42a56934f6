"""`gmeta benchmark antm2c`: all models on one log, cell by cell, and a page with a leaderboard for each track."""
