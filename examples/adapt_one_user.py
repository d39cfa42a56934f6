"""Five ratings in, scores out: a trained run adapts to one user in memory, without files.

python examples/adapt_one_user.py runs/demo/meta          # a run that `make demo` has left
"""

# %% Load a run: weights, tables and vocabularies, no optimizer state.
import sys

import gmeta

rec = gmeta.load(sys.argv[1])

# %% What a new user did. Values are raw, as in the logs; a pandas or polars DataFrame does as well.
support = {
    "user_id": [900001] * 5,
    "gender": ["f"] * 5,
    "age": [31] * 5,
    "city": ["c3"] * 5,
    "item_id": [3, 17, 25, 40, 111],
    "category": ["k0", "k1", "k1", "k2", "k3"],
    "brand": ["b1", "b4", "b2", "b7", "b3"],
    "price": [12.0, 8.5, 30.0, 4.2, 19.9],
    "click": [1, 0, 1, 1, 0],
}
user = rec.adapt(support)

# %% Score what might be shown next, before and after adapting.
candidates = {name: values[::-1] for name, values in support.items() if name != "click"} | {
    "item_id": [5, 8, 13, 21, 34]
}
after, before = user.predict(candidates), rec.adapt({}).predict(candidates)
for item, adapted, plain in zip(candidates["item_id"], after, before, strict=True):
    print(f"item {item:>3}: {adapted:.3f} (before adapting {plain:.3f})")
