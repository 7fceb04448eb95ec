#!/usr/bin/env bash
# Makes .venv in the repository's root with all that the demo and the tests need, and gets a ComfyUI to run them in.
# A second run finds its stamp and does nothing. demo.sh and test.sh call it; calling it alone is fine.
#
#   bash scripts/setup.sh [--browser | --check]
#       --browser: also see to a Chromium, for the tests of the frontend
#       --check: change nothing; succeed if nothing is missing
#
# PACKFORCING_TORCH  what to install as torch (default torch==2.13.0), e.g. another version for a certain GPU driver;
#                    remembered in .venv
# COMFYUI_PATH       a ComfyUI checkout to use in place of the packaged ComfyUI 0.3.75; its requirements.txt is
#                    installed, or those of 0.3.75 where it has none
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
torch="${PACKFORCING_TORCH:-$(cat "$venv/.torch" 2>/dev/null || echo torch==2.13.0)}"
stamp="$venv/.setup-done"         # the hash of everything the last complete set-up was made from
unfinished="$venv/.setup-running" # there while packages are being installed: after a kill, nothing inside is sure
cache="${XDG_CACHE_HOME:-$HOME/.cache}/packforcing"
runtime="${COMFYUI_PATH:-$cache/comfyui-0.3.75}"
frontend="$cache/frontend-1.58.1" # newer than the one that ComfyUI 0.3.75 pins; the tests open both

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

# Installs Debian packages when that is possible; says in one sentence when it is not. Never fails.
apt_install() {
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        say "please install the system package(s) '$*' (this needs root); carrying on without."
        return 0
    fi
    say "installing the system package(s) $*"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } \
        </dev/null >/dev/null || say "apt-get could not install '$*'; carrying on without."
}

# The first Python on the path that is new enough; ComfyUI and the pack want 3.10. In an activated environment its
# base: the environment could be the one about to be replaced.
find_python() {
    local python
    for python in python3 python3.13 python3.12 python3.11 python3.10; do
        "$python" -c 'import sys; sys.version_info < (3, 10) and sys.exit(1); print(sys._base_executable)' \
            2>/dev/null && return
    done
    fail "no Python 3.10 or newer was found on the path; please install one."
}

make_venv() {
    local python
    python="$(find_python)"
    say "making $venv with $("$python" --version)"
    # ensurepip is what Debian splits off into python3-venv
    "$python" -c 'import ensurepip, venv' 2>/dev/null || apt_install python3-venv
    "$python" -m venv --clear "$venv" || fail "'$python -m venv $venv' failed; is python3-venv installed?"
}

pip_install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@" </dev/null \
        || fail "pip could not install: $*"
}

wanted() {
    { echo "$torch" "$("$venv/bin/python" --version 2>&1)" "$PWD" "${COMFYUI_PATH:-}"
      cat scripts/setup.sh scripts/requirements-*.txt
      if [ -f requirements.txt ]; then cat requirements.txt; fi
      if [ -n "${COMFYUI_PATH:-}" ] && [ -f "$COMFYUI_PATH/requirements.txt" ]; then
          cat "$COMFYUI_PATH/requirements.txt"
      fi
    } | sha256sum
}

install_packages() {
    touch "$unfinished"
    # torch first and alone: left to a later requirement, pip would be free to pick another version or build.
    say "installing $torch (the largest part by far)"
    pip_install "$torch"
    # ComfyUI imports both at its start. Without their dependencies, so that torch stays as it is; the versions that
    # belong to a torch 2.N are torchvision 0.(N+15) and torchaudio 2.N, of which 2.11 works with every later torch.
    local minor
    minor="$("$venv/bin/python" -c 'from importlib.metadata import version as v; print(v("torch").split(".")[1])')"
    say "installing ComfyUI's requirements"
    pip_install --no-deps "torchvision==0.$((minor + 15)).*" "torchaudio==2.$((minor < 11 ? minor : 11)).*"
    if [ -n "${COMFYUI_PATH:-}" ] && [ -f "$COMFYUI_PATH/requirements.txt" ]; then
        grep -viE '^(torch|torchvision|torchaudio)([^a-z]|$)' "$COMFYUI_PATH/requirements.txt" >"$unfinished"
        pip_install -r "$unfinished"
    else
        pip_install -r scripts/requirements-comfyui.txt
        # The list of workflow templates, without which the server exits; their pictures (large) are left out.
        pip_install --no-deps comfyui-workflow-templates==0.7.25 comfyui-workflow-templates-core==0.3.12
    fi
    say "installing the tools of the tests and the demo"
    if [ -f requirements.txt ]; then pip_install -r requirements.txt; fi
    pip_install -r scripts/requirements-dev.txt
    "$venv/bin/python" scripts/comfyui.py install || fail "there is no ComfyUI to run; see above."
    rm -f "$unfinished"
    echo "$torch" >"$venv/.torch"
    wanted >"$stamp"
}

complete() {
    [ ! -e "$unfinished" ] && [ -x "$venv/bin/python" ] && [ "$(wanted)" = "$(cat "$stamp" 2>/dev/null)" ] \
        && [ -f "$runtime/main.py" ] && [ -f "$frontend/index.html" ]
}

has_chromium() {
    local name
    for name in "${CHROMIUM:-chromium}" chromium-browser google-chrome; do
        if command -v "$name" >/dev/null; then return 0; fi
    done
    return 1
}

if [ -n "${COMFYUI_PATH:-}" ] && [ ! -f "$COMFYUI_PATH/main.py" ]; then
    fail "COMFYUI_PATH is '$COMFYUI_PATH', which is not a ComfyUI checkout: it has no main.py."
fi

if [ "${1:-}" = "--check" ]; then
    complete || fail "not everything is set up; run scripts/setup.sh."
    exit 0
fi

# Two commands started together must not both install.
if command -v flock >/dev/null; then
    exec 9>"${TMPDIR:-/tmp}/packforcing-setup-$(id -u).lock"
    flock 9
fi

if ! complete; then
    if [ -e "$unfinished" ]; then
        say "the last set-up did not finish; starting over"
        make_venv
    elif ! "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        make_venv
    fi
    install_packages
fi
if [ "${1:-}" = "--browser" ] && ! has_chromium; then
    apt_install chromium
fi
