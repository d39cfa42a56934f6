"""The rules that `gmeta gate` judges by unless it is given others. This module imports nothing: the help shows it."""

CLICK_RULES = """\
rules:
  # Is there enough to judge by?
  - {rule: evidence, min_tasks: 50, min_rows: 1000}
  - {rule: finite}
  # Are the newest day's data sound? A candidate learned what is wrong with them: the current version tells.
  - {rule: label_mean, max_change: 0.3}
  - {rule: numeric_drift, max_shift: 3.0, max_spread: 5.0}
  - {rule: unknown_ids, max_share: 0.9}
  - {rule: current_chance, min: 0.48}
  - {rule: current_drop, metric: auc, max_drop: 0.05, min_rows: 500}
  - {rule: current_calibration, max_error: 0.5}
  # Is the candidate no worse than the current version? The more rows, the narrower the margin.
  - {rule: difference, metric: auc, slices: [all], margin: 0.02}
  - {rule: difference, metric: auc, slices: [all], margin: 0.01, min_rows: 5000}
  - {rule: difference, metric: auc, slices: [all], margin: 0.002, min_rows: 20000}
  - {rule: difference, metric: auc, slices: [warm, user_cold, item_cold, both_cold], margin: 0.03, min_rows: 1000}
  - {rule: difference, metric: auc, slices: [warm, user_cold, item_cold, both_cold], margin: 0.005, min_rows: 20000}
  - {rule: difference, metric: logloss, slices: [all], margin: 0.02}
  - {rule: difference, metric: logloss, slices: [all], margin: 0.01, min_rows: 5000}
  - {rule: difference, metric: logloss, slices: [all], margin: 0.002, min_rows: 20000}
  - {rule: difference, metric: ece, slices: [all], margin: 0.01, min_rows: 20000}
  # Is it fit to serve? What the current version fails too refuses nothing that is better.
  - {rule: calibration, max_error: 0.1, max_loss: 0.05}
  - {rule: baselines, metric: auc, min_gain: 0.0}
"""
"""For models of clicks (`loss: bce`)."""

RATING_RULES = """\
rules:
  - {rule: evidence, min_tasks: 50, min_rows: 1000}
  - {rule: finite}
  - {rule: label_mean, max_change: 0.3}
  - {rule: numeric_drift, max_shift: 3.0, max_spread: 5.0}
  - {rule: unknown_ids, max_share: 0.9}
  - {rule: current_drop, metric: mae, max_drop: 0.1, min_rows: 500}
  - {rule: difference, metric: mae, slices: [all], margin: 0.03}
  - {rule: difference, metric: mae, slices: [all], margin: 0.01, min_rows: 5000}
  - {rule: difference, metric: mae, slices: [all], margin: 0.004, min_rows: 20000}
  - {rule: difference, metric: mae, slices: [warm, user_cold, item_cold, both_cold], margin: 0.05, min_rows: 1000}
  - {rule: difference, metric: mae, slices: [warm, user_cold, item_cold, both_cold], margin: 0.01, min_rows: 20000}
  - {rule: difference, metric: rmse, slices: [all], margin: 0.03}
  - {rule: difference, metric: rmse, slices: [all], margin: 0.01, min_rows: 5000}
  - {rule: calibration, max_error: 0.1, max_loss: 0.05}
  - {rule: baselines, metric: mae, min_gain: 0.0}
"""
"""For models of ratings and other numbers. Margins of `mae`, `task_mae` and `rmse` are in standard deviations of the
day's labels."""

NEXT_ITEM_RULES = """\
rules:
  - {rule: evidence, min_tasks: 50, min_rows: 200}
  - {rule: finite}
  - {rule: unknown_ids, max_share: 0.9}
  - {rule: current_drop, metric: ndcg@10, max_drop: 0.7, min_rows: 200}
  - {rule: difference, metric: ndcg@10, slices: [all], margin: 0.02}
  - {rule: difference, metric: ndcg@10, slices: [all], margin: 0.01, min_rows: 5000}
  - {rule: difference, metric: ndcg@10, slices: [all], margin: 0.004, min_rows: 20000}
  - {rule: baselines, metric: ndcg@10, min_gain: 0.0}
"""
"""For models of next items. What `current_drop` allows is a share of what the metric was."""
