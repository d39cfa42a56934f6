"""Five ratings in, scores out: a trained run adapts to one user in memory, without files.

python examples/adapt_one_user.py RUN_DIR          # by default the run of `make demo`
"""

# %% Load a run: weights, tables and vocabularies, but no optimizer state.
import sys

import gmeta

rec = gmeta.load(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/meta")

# %% What a new user did. Values are raw, as in the logs; a pandas or polars DataFrame does as well.
user = {"user_id": [900001] * 5, "gender": ["f"] * 5, "age": [31] * 5, "city": ["city-7"] * 5}
support = user | {
    "item_id": [3, 17, 25, 40, 48],
    "category": ["category-2", "category-9", "category-9", "category-4", "category-2"],
    "brand": ["brand-1", "brand-14", "brand-22", "brand-7", "brand-3"],
    "price": [12.0, 8.5, 30.0, 4.2, 19.9],
    "label": [1, 0, 0, 1, 1],
}
adapted = rec.adapt(support)

# %% Score what might be shown next, after adapting and before.
candidates = user | {
    "item_id": [5, 8, 13, 21, 34],
    "category": ["category-2", "category-9", "category-4", "category-1", "category-9"],
    "brand": ["brand-1", "brand-14", "brand-7", "brand-5", "brand-22"],
    "price": [11.0, 9.5, 5.0, 14.0, 27.0],
}
after, before = adapted.predict(candidates), rec.adapt({}).predict(candidates)
for item, score, plain in zip(candidates["item_id"], after, before, strict=True):
    print(f"item {item:>2}: {score:.3f} (before adapting {plain:.3f})")
