#!/bin/sh
# Makes a virtual environment and installs smart into it, at the exact versions of requirements.lock.
#   sh install.sh           into .venv            VENV=/some/where sh install.sh   elsewhere
#   sh install.sh study     with what the listening study needs
#   sh install.sh test      with what the tests need as well
# Two packages ask for others that smart does not use: tinysoundfont for pyaudio, which needs PortAudio's headers to
# build, and audiobox_aesthetics for torchaudio, which breaks transformers beside a CPU build of torch. So all but
# torch is installed without dependencies; the lock names every package that is needed.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
venv=${VENV:-.venv}

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "install.sh: $python is not Python 3.11, 3.12 or 3.13; name one: PYTHON=python3.12 sh install.sh" >&2
    exit 2
}
if [ ! -x "$venv/bin/pip" ]; then
    "$python" -m venv "$venv" || {
        echo "install.sh: cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    }
fi
pip="$venv/bin/pip --disable-pip-version-check"
# a torch that is already there in the right version stays: so the smaller CPU build can be put there first
$pip install -c requirements.lock torch==2.13.0
$pip install --no-deps -r requirements.lock -e .
case ${1:-} in
    study) $pip install --no-deps -r requirements-study.lock ;;
    test) $pip install --no-deps -r requirements-study.lock -r requirements-test.lock ;;
esac
