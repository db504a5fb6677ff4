#!/usr/bin/env sh
# Builds the C example against the libllama that the extra 'device' installed: examples/device/build.sh OUTPUT
set -eu
python=${PYTHON:-.venv/bin/python}
output=${1:-guard}
site=$("$python" -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("llama_cpp").origin).parents[1])')
"${CC:-cc}" -std=c11 -O2 -Wall -Wextra -o "$output" "$(dirname "$0")/guard.c" \
  -I"$site/include" -L"$site/llama_cpp/lib" -Wl,-rpath,"$site/llama_cpp/lib" -lllama -lm
