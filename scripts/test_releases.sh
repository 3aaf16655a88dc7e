#!/usr/bin/env bash
# Run the tests of models, generation, training and the ecosystem on the oldest and the newest releases that
# pyproject.toml admits, each in a separate environment in .venv-releases/.
#
#   bash scripts/test_releases.sh                         # both
#   bash scripts/test_releases.sh oldest tests/modeling   # one of them; further arguments go to pytest
#   TORCH=2.13.0 bash scripts/test_releases.sh            # with this release of torch instead of the range's end
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

releases=(oldest newest)
if [ $# -gt 0 ] && [[ " ${releases[*]} " == *" $1 "* ]]; then
  releases=("$1")
  shift
fi
tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
  tests=(tests/modeling tests/ecosystem tests/trainer/test_exactness.py tests/trainer/test_recipe.py
    tests/trainer/test_resume.py tests/test_cli.py)
fi

for release in "${releases[@]}"; do
  environment=".venv-releases/$release"
  "${PYTHON:-python3}" -m venv --clear "$environment"
  python="$environment/bin/python"
  "$python" -m pip install --quiet packaging
  "$python" scripts/release_constraints.py "$release" ${TORCH:+--torch "$TORCH"} >"$environment/constraints.txt"
  echo "== $release releases: installing (a few minutes; up to 3 GB where torch comes with CUDA)"
  "$python" -m pip install --quiet --constraint "$environment/constraints.txt" torch
  "$python" -m pip install --quiet --constraint "$environment/constraints.txt" --editable ".[test]"
  echo "== $release releases: $("$python" -c 'import accelerate, torch, transformers, trl
for library in torch, transformers, accelerate, trl: print(library.__name__, library.__version__, end="  ")')"
  PATH="$PWD/$environment/bin:$PATH" "$python" -m pytest -q "${tests[@]}"
done
