#!/usr/bin/env bash
# Collects the wheels that bench/gpu.sh needs beside torch, transformers, accelerate, peft and what these bring along, for a machine
# without a network: bench/wheels.sh FOLDER [PYTHON_VERSION], by default for Python 3.12 on x86-64 Linux. About 46 MB, most of it
# bitsandbytes; without the 4-bit step: SKIP="bitsandbytes" bench/wheels.sh FOLDER.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:?usage: bench/wheels.sh FOLDER [PYTHON_VERSION]}
version=${2:-3.12}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

pinned=(annotated-types bitsandbytes cyclopts datasets dill docstring-parser multiprocess pydantic pydantic-core rich-rst
  typing-extensions typing-inspection)
others=(trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1 torch-optimi==0.3.3)

wanted=()
for name in "${pinned[@]}"; do
  # Names are written with - or _ in constraints.txt.
  pin=$(grep -iE "^${name//-/[-_]}==" constraints.txt | sed 's/[ #].*//')
  wanted+=("${pin:?$name is not in constraints.txt}")
done
for skipped in ${SKIP:-}; do
  kept=()
  for entry in "${wanted[@]}" "${others[@]}"; do [ "${entry%%==*}" = "$skipped" ] || kept+=("$entry"); done
  wanted=("${kept[@]}"); others=()
done

platforms=()
for each in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do platforms+=(--platform "${each}_x86_64"); done
mkdir -p "$folder"
rm -f "$folder"/*.whl
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
  --python-version "$version" "${platforms[@]}" --dest "$folder" "${wanted[@]}" ${others[@]+"${others[@]}"}
du -ch "$folder"/*.whl | sort -h
