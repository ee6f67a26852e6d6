#!/bin/sh
# deploy.sh [HOST...]
set -eu
ask() { curl -fsS --retry 5 -H "Authorization: Bearer $EKIBEN_TOKEN" "$@" "$EKIBEN_URL"; }
request=$(ask -X POST | jq .request)
while sleep 5; do
  state=$(ask | jq -r --argjson request "$request" '
    (.hosts // {}) as $hosts
    | (if $ARGS.positional == [] then $hosts | keys else $ARGS.positional end) as $wanted
    | [$wanted[] | $hosts[.].state // "failing"] as $states
    | if .served < $request or .running != null then "building"
      elif .last.result == "failed" or $states == [] or any($states[]; IN("failing", "stopped", "held")) then "failing"
      elif all($states[]; . == "deployed") then "deployed"
      elif any($states[]; . == "waiting") then "waiting"
      else "published" end' --args -- "$@")
  echo "$state"
  case $state in deployed) exit 0 ;; failing) exit 1 ;; esac
done
