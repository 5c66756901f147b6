#!/usr/bin/env bash
# Runs the whole suite, its tests, or JupyterLab, out of a virtual environment made beside this
# file. Needs only bash and Python 3.11 or newer. `./run_all.sh --help` lists the options.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
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
wanted() { echo "$here"; cat "$here/requirements.txt" "$here/pyproject.toml"; }

install() {
  if [[ -f $stamp && ! -e $unfinished && -x $python ]] && wanted | cmp -s - "$stamp"; then
    return
  fi
  # An install that was cut short, or whose Python has gone, is not worth repairing.
  if [[ -e $unfinished ]] || { [[ -d $venv ]] && ! "$python" -m pip --version >/dev/null 2>&1; }; then
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
  "${pip[@]}" -r "$here/requirements.txt"
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

install
# -P keeps a stray numpy.py in the caller's folder from being imported.
case "${1:-}" in
  test)
    shift
    cd "$here"
    exec "$python" -P -m pytest "$@"
    ;;
  lab)
    shift
    unset MPLBACKEND
    export JUPYTER_PREFER_ENV_PATH=1
    exec "$python" -P -m jupyterlab "--ServerApp.root_dir=$here/notebooks" "$@"
    ;;
  *) exec "$python" -P -m suite.run "$@" ;;
esac
