# Sourced by the other scripts from the repository root: an environment in .venv with the package and its test tools.
if [ ! -x .venv/bin/python ]; then
  echo "Making the environment in .venv (once)"
  "${PYTHON:-python3}" -m venv .venv
fi
source .venv/bin/activate
# Installed when the list of dependencies has changed since the last time.
stamp=.venv/installed
if ! cmp -s <(cat pyproject.toml constraints.txt) "$stamp"; then
  python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch" # the pinned build, first
  python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
  cat pyproject.toml constraints.txt >"$stamp"
fi
