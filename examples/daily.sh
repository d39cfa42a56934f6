#!/usr/bin/env bash
# Three days of a model that serves. Day one is published and answers under load. Day two has damaged labels: the gate
# refuses it, and day one goes on. Day three is published and taken up without a failed request; then back, and forward.
#
#   examples/daily.sh [FOLDER]     needs `pip install 'gmeta[serve]'`; about two minutes on 2 cores
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=${1:-runs/daily}
registry=$out/registry
gmeta=${GMETA:-gmeta}
python=${PYTHON:-python3}

rm -rf "$out"
mkdir -p "$out"
deliver() { "$gmeta" deliver --registry "$registry" --work "$out/work" "$@" >> "$out/deliver.log" 2>&1; }
served() { "$python" "$here/ask_server.py" --url-file "$out/url" --version; }
await() { # the server looks for a new version every half second
    for _ in $(seq 120); do
        [ "$(served)" != "$1" ] && return 0
        sleep 0.5
    done
    echo "the server still serves $1" >&2
    return 1
}

echo "== five days of clicks whose truth is known; the labels of day 3 are turned round"
"$gmeta" synth --out "$out/log" --days 5 --users 9000 --items 300 > "$out/synth.log"
"$python" - "$out/log/day=03" <<'PYTHON'
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

for file in Path(sys.argv[1]).glob("*.parquet"):
    table = pq.read_table(file)
    column = table.schema.get_field_index("label")
    pq.write_table(table.set_column(column, "label", pc.subtract(1, table["label"])), file)
PYTHON

echo "== day one: a first version of days 0 to 2"
deliver --schema "$out/log/schema.yaml" --input "[$out/log/day=00, $out/log/day=01, $out/log/day=02]"

"$gmeta" serve --registry "$registry" --cache_dir "$out/cache" --port 0 --poll_s 0.5 --access_log false \
    > "$out/serve.log" 2>&1 &
server=$!
load=
trap 'kill $server $load 2> /dev/null || true' EXIT
for _ in $(seq 120); do
    grep -q ' on http' "$out/serve.log" && break
    kill -0 $server 2> /dev/null || { cat "$out/serve.log" >&2; exit 1; }
    sleep 0.5
done
sed -n 's/.* on \(http[^ ]*\).*/\1/p' "$out/serve.log" | head -1 > "$out/url"
first=$(served)
echo "   serves $first"
"$python" "$here/ask_server.py" --url-file "$out/url" --log "$out/log/day=02" --out "$out/asked.json" &
load=$!

echo "== day two: damaged labels"
code=0
deliver --input "$out/log/day=03" || code=$?
[ "$code" = 3 ] || { echo "expected a refusal, exit code 3; found $code" >&2; tail -20 "$out/deliver.log" >&2; exit 1; }
[ "$(served)" = "$first" ] || { echo "the refused version is served" >&2; exit 1; }
echo "   refused, and $first goes on"

echo "== day three"
deliver --input "$out/log/day=04"
await "$first"
third=$(served)
echo "   serves $third"

echo "== back, and forward"
"$gmeta" registry rollback --registry "$registry"
await "$third"
[ "$(served)" = "$first" ]
"$gmeta" registry rollback --to 3 --registry "$registry"
await "$first"
[ "$(served)" = "$third" ]

kill -TERM $load
wait $load
load=
kill -TERM $server
wait $server || true
trap - EXIT
"$gmeta" registry list --registry "$registry"
"$python" "$here/ask_server.py" --summary "$out/asked.json"
