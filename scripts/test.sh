#!/usr/bin/env bash
# Run the tests; the first call creates the environment .venv.
#
#   bash scripts/test.sh              # the default tests, a few minutes on two cores
#   bash scripts/test.sh --slow       # all tests, those marked `slow` included: hours, and downloads of several GB
#   bash scripts/test.sh -k lasp2     # other arguments go to pytest, also behind --slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh ".[dev]"
if [ "${1:-}" = --slow ]; then
  set -- -m "" "${@:2}"
fi
exec python -m pytest "$@"
