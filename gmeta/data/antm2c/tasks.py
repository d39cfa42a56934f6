"""Which events of AntM2C make a task, and which of them it knows: stage 2, between the events and their columns.

Tasks are users, users in a scene, or items of a scene, each in a split. Its query is what happened in the split, its
support are the last events before. In train the last `QUERY` events are the query, those before them the support.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gmeta.config.data import PrepareConfig
from gmeta.core.errors import nearest, require
from gmeta.data.antm2c.published import SCENES
from gmeta.data.sources import Connection, literal, md5_64, scalar

OF_LOGS = ("separator", "images", "tasks", "new_scene", "new_scene_rows", "new_users")
"""Settings of `gmeta prepare` that logs alone take."""
SUPPORT, QUERY = 50, 10
"""How many rows a support of valid and test has, and a query of train."""
NEW_SCENE_ROWS = (0, 100, 1000, 10_000)
"""How many rows before test the tasks of a scene that is left out know, where no others are named."""
KEYS = {
    "user": "user_id",
    "user_scene": "concat_ws('/', user_id, scene)",
    "scene_item": "concat_ws('/', scene, item_id)",
}
"""Kind of task -> SQL of its key."""


@dataclass(frozen=True)
class TaskPlan:
    """What tasks are, and what is held out."""

    tasks: str = "user"
    new_scene: int | None = None
    new_scene_rows: tuple[int, ...] = NEW_SCENE_ROWS
    new_users: float = 0.0
    seed: int = 0


def plan_of(config: PrepareConfig, seed: int) -> TaskPlan:
    """Return the plan of a config, with the seed that draws new users. ValueError for settings that cannot be."""
    tasks, scene, share = config.tasks or "user", config.new_scene, config.new_users or 0.0
    require(tasks in KEYS, "tasks", tasks, nearest(tasks, KEYS))
    require(scene is None or 0 <= scene < SCENES, "new_scene", scene, f"scenes are 0 to {SCENES - 1}")
    require(0 <= share < 1, "new_users", share, "must be at least 0 and below 1")
    require(scene is None or not share, "new_users", share, "new_scene holds out something else: leave one out")
    given = config.new_scene_rows
    rows = tuple(given if isinstance(given, list) else [given]) if given not in (None, []) else NEW_SCENE_ROWS
    for number in rows:
        fits = isinstance(number, int) and number >= 0
        require(fits, "new_scene_rows", given, "must be numbers of rows, such as [0, 100, 1000]")
    require(scene is not None or given in (None, []), "new_scene_rows", given, "has no effect without new_scene")
    return TaskPlan(tasks, scene, tuple(sorted(set(map(int, rows)))), share, seed)


def deal_events(con: Connection, plan: TaskPlan) -> None:
    """Make table `dealt` (event, task, partition, role, row) of table `placed` (event, user_id, item_id, scene, time,
    split and more); `row` numbers the rows, of each task in order. An event that a support repeats is in it several
    times.

    Raises:
        ValueError: the scene that is left out has fewer rows before test than its tasks are to know.
    """
    con.execute(f"""
        CREATE TEMP TABLE keyed AS
        SELECT event, split, scene = {literal(str(plan.new_scene))} AS new, {_held(plan)} AS held,
               {KEYS[plan.tasks]} AS task,
               row_number() OVER (PARTITION BY {KEYS[plan.tasks]} ORDER BY time, event) AS place
        FROM placed""")
    asked, known = "true", "true"
    if plan.new_scene is not None:
        asked, known = "if(split = 'test', new, NOT new)", "NOT new"
    elif plan.new_users:
        asked = "if(split = 'train', NOT held, held)"
    con.execute(f"""
        CREATE TEMP TABLE asked AS
        SELECT event, task, split, place, row_number() OVER (PARTITION BY task, split ORDER BY place DESC) AS back
        FROM keyed WHERE {asked};
        CREATE TEMP TABLE starts AS SELECT task, split, min(place) AS start FROM asked WHERE split <> 'train'
                               GROUP BY task, split""")
    query = f"if(split <> 'train' OR back <= {QUERY}, 'query', 'support') AS role"
    parts = [f"SELECT event, task, split AS partition, {query}, place FROM asked"]
    parts.append(f"""SELECT event, task, s.split, 'support', place
                     FROM (SELECT * EXCLUDE (split) FROM keyed WHERE {known}) JOIN starts s USING (task)
                     WHERE place < s.start
                     QUALIFY row_number() OVER (PARTITION BY task, s.split ORDER BY place DESC) <= {SUPPORT}""")
    if plan.new_scene is not None:
        parts[0] += " WHERE split <> 'test'"
        parts[1] = parts[1].replace("WHERE place < s.start", "WHERE s.split <> 'test' AND place < s.start")
        parts += _of_new_scene(con, plan.new_scene, plan.new_scene_rows)
    # a window over all rows at once would have to fit into memory: tasks are numbered first, and rows within theirs
    con.execute(f"""
        CREATE TEMP TABLE unnumbered AS {" UNION ALL ".join(parts)};
        DROP TABLE keyed; DROP TABLE asked; DROP TABLE starts;
        CREATE TEMP TABLE dealt AS
        SELECT event, task, partition, role,
               before + row_number() OVER (PARTITION BY task, partition ORDER BY place) AS row
        FROM unnumbered JOIN (
            SELECT task, partition, CAST(sum(count(*)) OVER (ORDER BY task, partition) - count(*) AS BIGINT) AS before
            FROM unnumbered GROUP BY task, partition) USING (task, partition);
        DROP TABLE unnumbered""")


def _held(plan: TaskPlan) -> str:
    """Return SQL of whether an event is of a user who is held out."""
    if not plan.new_users:
        return "false"
    drawn = md5_64(literal(f"new_users|{plan.seed}"), "user_id")
    return f"{drawn} % 1000000 < {round(plan.new_users * 1_000_000)}"


def _of_new_scene(con: Connection, scene: int, rows: Sequence[int]) -> list[str]:
    """Return SQL of the test tasks of the scene that is left out, each once for every number of known rows."""
    con.execute("""CREATE TEMP TABLE known AS
                   SELECT event, row_number() OVER (ORDER BY event_time DESC, event DESC) AS back
                   FROM (SELECT k.event, p.time AS event_time FROM keyed k JOIN placed p USING (event)
                         WHERE k.new AND k.split <> 'test')""")
    there = scalar(con, "SELECT count(*) FROM known")
    if there < max(rows):
        raise ValueError(
            f"new_scene_rows names {max(rows):,} rows{'' if rows != NEW_SCENE_ROWS else ', which is its default'}, and "
            f"scene {scene} has {there:,} before test: name no more, such as --new_scene_rows "
            f"'{[number for number in rows if number <= there]}'"
        )
    found = []
    for number in rows:
        task = f"concat(task, '@{number}')"
        found.append(f"SELECT event, {task}, 'test', 'query', place FROM keyed WHERE new AND split = 'test'")
        found.append(f"""SELECT event, {task}, 'test', 'support', place FROM keyed JOIN known USING (event)
                         WHERE back <= {number} AND task IN (SELECT task FROM keyed WHERE new AND split = 'test')""")
    return found
