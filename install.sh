#!/bin/sh
# Creates a virtual environment and installs smart and the exact versions of requirements.lock into it.
#   sh install.sh           into .venv (VENV=/some/where sh install.sh: into another folder)
#   sh install.sh study     also the packages for the listening study
#   sh install.sh test      also the packages for the listening study and the tests
# Two packages depend on others that smart does not use: tinysoundfont on pyaudio, which needs PortAudio's headers to
# build, and audiobox_aesthetics on torchaudio, which breaks transformers next to a CPU build of torch. So everything
# except torch is installed without dependencies; the lock file lists every package that is needed.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
venv=${VENV:-.venv}

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || {
    echo "install.sh: $python is not Python 3.11 to 3.14; name one: PYTHON=python3.12 sh install.sh" >&2
    exit 2
}
if [ ! -x "$venv/bin/pip" ]; then
    "$python" -m venv "$venv" || {
        echo "install.sh: cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    }
fi
pip="$venv/bin/pip --disable-pip-version-check"
# first, because it can fail: wheels exist for Python 3.11 and 3.12 on x86-64 Linux and on Apple silicon; otherwise pip
# compiles it
$pip install --no-deps -c requirements.lock tinysoundfont || {
    echo "install.sh: tinysoundfont has no wheel for this Python and could not be compiled: it needs a C++ compiler and" \
        "Python's headers (Debian, Ubuntu: apt install g++ python3-dev; macOS: xcode-select --install)," \
        "or use Python 3.11 or 3.12" >&2
    exit 2
}
# an installed torch of this version is kept, so you can install the smaller CPU build first
$pip install -c requirements.lock torch==2.13.0
$pip install --no-deps -r requirements.lock -e .
case ${1:-} in
    study) $pip install --no-deps -r requirements-study.lock ;;
    test) $pip install --no-deps -r requirements-study.lock -r requirements-test.lock ;;
esac
