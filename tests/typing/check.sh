#!/bin/sh
# Check what users write by mypy and pyright with celery-types, which are installed into a folder of their own: the
# project's own environment has no stubs of Celery.
#   tests/typing/check.sh FOLDER [PYTHON]
set -eu
folder=$1
python=${2:-python3}
[ -d "$folder/celery-stubs" ] || "$python" -m pip install -q --target "$folder" celery-types mypy pyright
mkdir -p "$folder/stubs"
for stubs in "$folder"/*-stubs; do ln -sfn "$stubs" "$folder/stubs/"; done
packages=$("$python" -c "import celery, pathlib; print(pathlib.Path(celery.__file__).parents[1])")
printf '[mypy]\nstrict = True\nmypy_path = %s/stubs:%s\nexplicit_package_bases = True\n[mypy-resilient_tasks.*]\nfollow_imports = silent\n' \
  "$folder" "$PWD" > "$folder/mypy.ini"
printf '{"extraPaths": ["%s", "%s", "%s"], "typeCheckingMode": "strict"}\n' \
  "$folder/stubs" "$PWD" "$packages" > "$folder/pyrightconfig.json"
export PYTHONPATH="$folder:$packages"
"$python" -m mypy --config-file "$folder/mypy.ini" --cache-dir "$folder/cache" tests/typing/shop.py tests/typing/mistakes.py
"$python" -m pyright -p "$folder/pyrightconfig.json" tests/typing/shop.py
