#!/bin/sh
# make_venv.sh PYTHON VENV: a virtual environment with pip, also where Debian's python3 comes without python3-venv.
set -eu
python=$1
venv=$2

command -v "$python" >/dev/null || {
  echo "make: there is no '$python'; install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2
  exit 1
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "make: $("$python" --version) is too old; name Python 3.10 or newer: make PYTHON=/path/to/python3" >&2
  exit 1
}

has_pip() { "$venv/bin/python" -m pip --version >/dev/null 2>&1; }
built_in() { rm -rf "$venv" && "$python" -m venv "$venv" >/dev/null 2>&1 && has_pip; }
# Debian and Ubuntu name the package after the version: python3.12-venv; python3-venv is that of their default Python.
apt_get() {
  command -v apt-get >/dev/null || return 1
  if [ "$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo="sudo -n"; else return 1; fi
  package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
  echo "make: $python has no ensurepip; installing $package" >&2
  $sudo apt-get update -qq >/dev/null && $sudo apt-get install -y -qq "$package" >/dev/null
}

built_in && exit 0
command -v virtualenv >/dev/null && rm -rf "$venv" && virtualenv -q -p "$python" "$venv" && has_pip && exit 0
command -v uv >/dev/null && rm -rf "$venv" && uv venv -q --seed -p "$python" "$venv" && has_pip && exit 0
apt_get && built_in && exit 0
echo "make: '$python -m venv' does not work here; install python3-venv (or virtualenv, or uv) and run make again" >&2
exit 1
