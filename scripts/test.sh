#!/usr/bin/env bash
# Runs the tests; makes the environment first if there is none. Arguments go to pytest: scripts/test.sh -k lasp2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh ".[dev]"
exec python -m pytest "$@"
