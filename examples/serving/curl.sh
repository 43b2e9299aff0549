#!/bin/sh
# A server of yours by curl: how it is, an answer, a stream, the record of an answer.
#
#     tsqp-shm serve --mode verified --port 8000
#     sh examples/serving/curl.sh http://127.0.0.1:8000
set -eu
url=${1:-http://127.0.0.1:8000}
key="Authorization: Bearer ${TSQP_SHM_API_KEY:-none}"
body='{"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 8, "temperature": 0'

curl -sS "$url/health"; echo
curl -sS -D /dev/stderr "$url/v1/chat/completions" -H "$key" -d "$body}" 2>headers.txt; echo
curl -sSN "$url/v1/chat/completions" -H "$key" -d "$body, \"stream\": true}"

# In modes that compute with integers: how that answer was computed and checked, for whoever has the key that asked.
id=$(sed -n 's/^x-tsqp-evidence: *\([^ \r]*\).*/\1/p' headers.txt)
[ -z "$id" ] || curl -sS "$url/v1/evidence/$id" -H "$key"
rm headers.txt
