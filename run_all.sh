#!/usr/bin/env bash
# Runs the whole suite, its tests, or JupyterLab, out of a virtual environment made beside this
# file. Needs only bash and Python 3.11 or newer. `./run_all.sh --help` lists the options.
set -euo pipefail

unset CDPATH   # with it `cd` may go elsewhere, and prints where
self="$(readlink -f -- "${BASH_SOURCE[0]}" 2>/dev/null || printf '%s' "${BASH_SOURCE[0]}")"
here="$(cd -- "$(dirname -- "$self")" && pwd -P)"
export HOME="${HOME:-/tmp}"   # matplotlib and Jupyter want one
venv="$here/.venv"
python="$venv/bin/python"
stamp="$venv/.installed"          # what was installed; written last
unfinished="$venv/.installing"    # there while an install is under way

find_python() {
  local name found=""
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    found="$name"
    "$name" -c 'import ensurepip, venv' 2>/dev/null && { echo "$name"; return; }
  done
  if [[ -n $found ]]; then
    echo "run_all.sh: $found cannot make virtual environments; install its venv package" \
      "(on Debian and Ubuntu: apt install python3-venv)" >&2
  else
    echo "run_all.sh: needs Python 3.11 or newer, found none under python3, python3.14," \
      "python3.13, python3.12, python3.11" >&2
  fi
  return 1
}

# The folder is part of it because a virtual environment does not survive being moved.
wanted() { echo "$here"; cat "$here"/{requirements,constraints}.txt "$here/pyproject.toml"; }

install() {
  if [[ -f $stamp && ! -e $unfinished && -x $python ]] && wanted | cmp -s - "$stamp"; then
    return
  fi
  # Only what this script made is its to delete: it has a stamp, or the mark of an install under way.
  if [[ -e $venv && ! -e $stamp && ! -e $unfinished ]]; then
    echo "run_all.sh: $venv was not made by run_all.sh; move it away and run again" >&2
    return 1
  fi
  # A first install that was cut short, or whose Python has gone, is not worth repairing.
  if [[ -e $unfinished && ! -e $stamp ]] ||
    { [[ -d $venv ]] && ! "$python" -m pip --version >/dev/null 2>&1; }; then
    rm -rf "$venv"
  fi
  local base
  if [[ ! -x $python ]]; then
    base="$(find_python)"
    mkdir -p "$venv" && touch "$unfinished"
    echo "run_all.sh: making .venv with $("$base" --version)"
    "$base" -m venv "$venv"
  fi
  touch "$unfinished"
  echo "run_all.sh: installing requirements.txt into .venv (a few minutes, once)"
  local pip=("$python" -m pip --disable-pip-version-check install -qq)
  "${pip[@]}" -r "$here/requirements.txt" -c "$here/constraints.txt"
  "${pip[@]}" --no-deps --no-build-isolation -e "$here"
  wanted >"$stamp"
  rm "$unfinished"
}

# Other people's packages and start-up files have no say in the results.
unset PYTHONHOME
export PYTHONPATH="$here/notebooks"   # where the package `suite` lies
export PYTHONNOUSERSITE=1 PYTHONHASHSEED=0 MPLBACKEND=agg
# Threads that wait spin for some microseconds only: sleeping at once doubled the latency of a frame,
# spinning for long takes the cores from other programs.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
  export OMP_NUM_THREADS=$((cores < 8 ? cores : 8))
fi

# glibc hands every large tensor back to the kernel and faults it in again, page by page. Keeping them,
# in huge pages, made a training step 1.1 to 1.5 times as fast. Other C libraries ignore this.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296}"

# Two at once: the second waits until the first has installed. The kernel drops the lock.
lock="$here/.venv.lock"
if { exec 9>"$lock"; } 2>/dev/null; then
  if command -v flock >/dev/null; then
    flock -n 9 || { echo "run_all.sh: another one is installing; waiting" >&2; flock 9; }
  fi
  install
  exec 9>&-
else
  install   # a checkout that cannot be written, with an environment that is there
fi
# -P keeps a stray numpy.py in the caller's folder from being imported.
case "${1:-}" in
  test|tests)
    shift
    cd "$here"
    exec "$python" -P -m pytest "$@"
    ;;
  lab)
    shift
    unset MPLBACKEND
    export JUPYTER_PREFER_ENV_PATH=1
    exec "$python" -P -m suite.run.lab "$@"
    ;;
  *) exec "$python" -P -m suite.run "$@" ;;
esac
