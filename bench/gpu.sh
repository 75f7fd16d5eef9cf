#!/usr/bin/env bash
# Everything that is measured on a GPU. `bench/gpu.sh --help` lists the flags, bench/README.md explains them.
#   bench/gpu.sh --wheels FOLDER --out FOLDER --part 1      then --part 2 and so on: each within eight minutes
#   bench/gpu.sh --rehearse --out FOLDER                    the same steps on the CPU, tiny
# PYTHON names the interpreter that has torch and transformers; what it lacks comes from the wheels (bench/wheels.sh).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

wheels=""
previous=""
for word in "$@"; do
  case "$word" in --wheels=*) wheels=${word#--wheels=} ;; esac
  [ "$previous" = "--wheels" ] && wheels=$word
  previous=$word
done

export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "$wheels" ]; then
  ls "$wheels"/*.whl > /dev/null || { echo "bench/gpu.sh: no wheels in $wheels; bench/wheels.sh $wheels collects them" >&2; exit 2; }
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "$site" "$wheels"/*.whl || { echo "bench/gpu.sh: the wheels cannot be installed" >&2; exit 2; }
  export PYTHONPATH="$PYTHONPATH:$site"
fi
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
"$PYTHON" -m bench.gpu "$@" &
child=$!
trap 'kill -TERM $child 2> /dev/null' TERM INT
wait $child; code=$?
# A trapped signal ends the first wait early; the second one waits for the steps to be ended.
[ $code -gt 128 ] && { wait $child; code=$?; }
[ -n "${site:-}" ] && rm -rf "$site"
exit $code
