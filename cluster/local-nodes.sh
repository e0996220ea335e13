#!/usr/bin/env bash
# A cluster of a head without CPUs and two nodes of one CPU each, all on this machine and on loopback alone:
# to see how a sweep behaves on several nodes before there are any.
#
#   bash cluster/local-nodes.sh rltune sweep experiments/mix.yaml --address 127.0.0.1:6399
#
# The command runs once the nodes are there; the cluster is taken down when it ends.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,7p' "$0"; exit 2; }

export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
folder=$(mktemp -d /tmp/rlt-XXXXXX)
nodes=()
stop() {
    kill "${nodes[@]}" 2>/dev/null || true
    wait "${nodes[@]}" 2>/dev/null || true
    rm -rf "$folder"
}
trap stop EXIT

ray start --head --node-ip-address=127.0.0.1 --port=6399 --num-cpus=0 --dashboard-host=127.0.0.1 \
    --temp-dir="$folder" --block >"$folder/head.log" 2>&1 &
nodes+=($!)
until ray health-check --address 127.0.0.1:6399 >/dev/null 2>&1; do
    kill -0 "${nodes[0]}" 2>/dev/null || { cat "$folder/head.log"; exit 1; }
    sleep 1
done
# one after the other: raylets that start together on one machine may take each other's ports
for number in 1 2; do
    ray start --address=127.0.0.1:6399 --node-ip-address=127.0.0.1 --num-cpus=1 --block \
        >"$folder/node-$number.log" 2>&1 &
    nodes+=($!)
    timeout 180 python3 - "$((number + 1))" <<'END' || { cat "$folder/node-$number.log"; exit 1; }
import sys
import time

import ray

ray.init(address="127.0.0.1:6399", logging_level="ERROR", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]):
    time.sleep(0.5)
END
done
"$@"
