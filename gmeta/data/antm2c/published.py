"""What is published of AntM2C's released part (10 million rows): its columns, its split and its counts.

The counts are those of public code that reads the files (MMCTR-Bench); the paper is arXiv 2308.16437.
"""

from __future__ import annotations

from datetime import datetime

LOGS = {"antm2c": False, "antm2c-legacy": True}
"""Name of a data set -> whether times that cannot be parsed are filled, as public code does, or refused."""
PARTS = 3
"""The log comes in files antm2c_10m_part0 to antm2c_10m_part2, each with a header."""
IMAGES = "AntM2C_image.tar.gz"

SEQUENCES = ("bill_entity_seq", "service_entity_seq", "query_entity_seq")
DEEP_FEATURES = tuple(f"deep_features_{number}" for number in range(27))
COLUMNS = (
    *("user_id", "item_id", "log_time", "label"),
    *SEQUENCES,
    *("item_entity_names", "item_title", "scene"),
    *DEEP_FEATURES,
)
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"

SPLITS = ("train", "valid", "test")
SCENES = 5
TRAIN_ENDS, VALID_ENDS = datetime(2023, 8, 3), datetime(2023, 8, 5)
"""Rows up to and including the first are train, later ones up to and including the second valid, all others test."""
SCENE_THOUSANDS = ((535, 2226, 4076, 1024, 676), (35, 153, 449, 52, 34), (83, 379, 1174, 194, 103))
"""Thousands of rows of each split and scene."""
ROWS = (8_536_558, 721_500, 1_932_927)
POSITIVES = (2_765_092, 267_870, 734_363)
USERS, ITEMS = 67_624, 84_900
TRAIN_USERS, TRAIN_ITEMS, TEST_ITEMS = 67_604, 69_731, 29_484
SEVERAL_NAMES = 247 / 2820
"""The share of items with several values of item_entity_names; one had 19."""
