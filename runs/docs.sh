#!/usr/bin/env bash
# The documentation as a site in build/site; with --serve at http://127.0.0.1:8001, made anew at
# each change. Needs pip install -c constraints.txt -e ".[docs]".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export NO_MKDOCS_2_WARNING=1
if [[ ${1:-} == --serve ]]; then
    exec mkdocs serve --dev-addr 127.0.0.1:8001
fi
mkdocs build --strict
