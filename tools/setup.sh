#!/usr/bin/env bash
# Make .venv what requirements/cpu.txt says (ENGINE=gpu: gpu.txt), with stoker itself in it. Does nothing when that
# is so already; goes on after an interruption. PYTHON chooses the interpreter, TORCH_INDEX where to look for torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
python=$venv/bin/python
engine=${ENGINE:-cpu}
lock=requirements/$engine.txt
stamp=$venv/.setup-done
built=$venv/.native-built
log=$venv/setup.log # what pip says beside its errors
torch=2.13.0+cpu
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# What the environment was made from, its own place included: an editable install points at it.
fingerprint() {
    {
        echo "$engine"
        cat "$lock" pyproject.toml tools/setup.sh
        pwd
        "$python" -VV
    } 2>/dev/null | sha256sum
}

# What the native loader was built from.
native() { find libs/checkpoint/CMakeLists.txt libs/checkpoint/csrc -type f -not -path '*/tests/*' -print0 | sort -z | xargs -0 sha256sum; }

supported() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.12 python3.11; do
        if supported "$candidate"; then echo "$candidate"; return; fi
    done
    die "no Python 3.11 or 3.12 with its venv module was found (tried ${PYTHON:-} python3 python3.12 python3.11).
       Install one (Debian: apt install python3-venv) or name one: make setup PYTHON=/path/to/python3.12"
}

installed() { "$python" -c "import importlib.metadata as m, sys; sys.exit(m.version('$1') != '$2')" 2>/dev/null; }

# Run pip with its warnings kept in the log; on a failure its errors are shown.
pip() {
    local from code=0
    from=$(wc -c <"$log")
    "$python" -m pip --disable-pip-version-check --no-input "$@" 2>>"$log" || code=$?
    if ((code)); then tail -c +"$((from + 1))" "$log" | grep -vE '^WARNING: (Location|Retrying)' | tail -n 8 >&2; fi
    return "$code"
}

install_torch() {
    if installed torch "$torch"; then return; fi
    say "torch $torch, from where pip is configured to look"
    if pip install --no-deps --quiet --timeout 15 --retries 1 "torch==$torch" 2>/dev/null; then return; fi
    say "not there; from $torch_index (about 200 MB)"
    if pip install --no-deps --quiet --timeout 15 --retries 1 --index-url "$torch_index" "torch==$torch"; then return; fi
    die "torch $torch for CPUs could not be installed.
       Check the connection to $torch_index, name a mirror of it (make setup TORCH_INDEX=URL),
       or download the wheel and let pip see it (PIP_FIND_LINKS=/folder make setup)."
}

install_lock() {
    local total count=0 line
    total=$(grep -cE '^[a-zA-Z0-9]' "$lock")
    say "$total packages of $lock (a few minutes the first time)"
    pip install --no-deps --require-hashes --progress-bar off -r "$lock" | while IFS= read -r line; do
        case $line in
            Collecting*)
                count=$((count + 1))
                if ((count % 40 == 0)); then say "  $count of $total fetched"; fi ;;
            Installing*) say "  unpacking" ;;
        esac
    done
}

# The Python files of the checkout are used where they lie; only the native loader is built.
install_stoker() {
    say "stoker itself, and its native loader (a minute the first time)"
    rm -f "$built"
    PATH=$PWD/$venv/bin:$PATH pip install --no-deps --no-build-isolation --quiet -e . ||
        die "stoker could not be built; is there a C++20 compiler (Debian: apt install g++)? All of the output is in $log"
    native >"$built"
}

main() {
    [[ -f $lock ]] || die "ENGINE is cpu or gpu, not '$engine'"
    trap '[[ $? == 0 ]] || say "not finished; make setup goes on from here" >&2' EXIT
    if ! [[ -f $stamp && $(fingerprint) == "$(cat "$stamp")" ]]; then
        rm -f "$stamp" "$built"
        if ! supported "$python"; then
            local base
            base=$(find_python)
            say "creating $venv with $("$base" -V)"
            "$base" -m venv --clear "$venv"
        fi
        : >"$log"
        if [[ $engine == cpu ]]; then install_torch; fi # the GPU's torch is PyPI's, and in the lock
        install_lock
        fingerprint >"$stamp"
    fi
    if ! [[ -f $built && $(native) == "$(cat "$built")" ]]; then
        install_stoker
        say "done"
    fi
}

main
