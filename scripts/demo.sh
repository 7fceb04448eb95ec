#!/usr/bin/env bash
# Sets up what is needed and makes a video with workflows/quickstart.json in a real ComfyUI, without a browser:
#   bash scripts/demo.sh [--prompt TEXT | --story FILE] [--seconds N] [--seed N]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

bash "$root/scripts/setup.sh"
exec "$root/.venv/bin/python" "$root/scripts/demo.py" "$@"
