#!/bin/sh
# Print the first interpreter that runs and can make a virtual environment, newest version first.
# Usage: sh scripts/find_python.sh [VERSION...]    (default: 3.13 3.12 3.11)
#
# A name on PATH proves nothing: version managers put shims there that only print an error, and some distributions ship
# a Python without `ensurepip`. So each candidate is run.

[ "$#" -gt 0 ] || set -- 3.13 3.12 3.11

works() {
  "$1" -c "import ensurepip, ssl, sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" >/dev/null 2>&1
}

for version in "$@"; do
  managed="$(pyenv prefix "$version" 2>/dev/null)/bin/python"
  for candidate in "python$version" "$managed" python3 python; do
    if works "$candidate" "$version"; then
      "$candidate" -c "import sys; print(sys.executable)"
      exit 0
    fi
  done
done
echo "no Python $* that runs and can make a virtual environment; set PYTHON=/path/to/python" >&2
exit 1
