#!/bin/bash
# Counts to its first argument, a number every $PAUSE seconds, and saves how far it is to count.txt.
# Knows nothing of hpcresume: killed at any moment and started again, it goes on where it was.
last=${1:-100}
count=$(cat count.txt 2>/dev/null || echo 0)
while ((count < last)); do
    sleep "${PAUSE:-1}"
    count=$((count + 1))
    # Renamed, so that a kill leaves the old number or the new one, never half of it.
    echo "$count" >count.tmp && mv count.tmp count.txt
    echo "step $count"
done
