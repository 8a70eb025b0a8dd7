#!/usr/bin/env bash
# Puts the programs of test/clients and of examples/spiffe that are not in Go at
# .tools/clients below the working directory: each on its language's SPIFFE library,
# from that language's registry, at the version that its folder pins. What is there
# already, from the same sources, stays. The first run takes three minutes on
# two cores.
set -euo pipefail

umask 022 # other users run what is made here
sources=test/clients
examples=examples/spiffe
dir=$PWD/.tools/clients
mkdir -p "$dir"

# Two builds at once would only slow each other down.
exec 9>"$dir/lock"
if ! flock -n 9; then
  echo "clients: waiting for another build"
  flock 9
fi

# Debian's own, where there is one: what an ordinary user may not execute, such
# as a Python below the home of root, cannot be a workload of such a user.
python=/usr/bin/python3
[[ -x $python ]] || python=$(command -v python3 || echo python3)

# oldest PROGRAM HAVE WANT HINT
oldest() {
  if [[ -z $2 || $(printf '%s\n' "$3" "$2" | sort -V | head -n 1) != "$3" ]]; then
    echo "clients: $1 $3 or newer is needed, and this is ${2:-not there}; $4" >&2
    exit 1
  fi
}

# wanted LANGUAGE TOOL: what has to be the same for the last build to be good.
wanted() { { echo "$2"; sha256sum "$0"; find "$sources/$1" "$examples/$1" -type f -not -path '*/target/*' -not -path '*/venv/*' -print0 | sort -z | xargs -0 sha256sum; } | sha256sum; }

# progress WHAT: a line every 20 seconds until it is killed.
progress() {
  while sleep 20; do
    echo "clients: still getting $1 (${SECONDS} s)"
  done
}

# get LANGUAGE TOOL: runs install_LANGUAGE, unless that was done.
get() {
  local want
  want=$(wanted "$1" "$2")
  if [[ -e $dir/$1/installed && $(<"$dir/$1/installed") == "$want" ]]; then
    return
  fi
  echo "clients: getting the one in $1 ($2)"
  mkdir -p "$dir/$1"
  rm -f "$dir/$1/installed"
  SECONDS=0
  progress "$1" 9>&- &
  local ticker=$!
  trap 'kill "$ticker" 2>/dev/null || true' EXIT
  "install_$1"
  kill "$ticker"
  wait "$ticker" 2>/dev/null || true
  trap - EXIT
  echo "$want" >"$dir/$1/installed"
  echo "clients: $1 took $SECONDS s"
}

# example LANGUAGE: builds the example as its README says, word for word, in a copy
# of its folder. It is the first block of commands there.
example() {
  local commands
  commands=$(awk '/^```sh$/ { on = 1; next } /^```$/ { if (on) exit } on' "$examples/$1/README.md")
  if [[ -z $commands ]]; then
    echo "clients: $examples/$1/README.md has no block of commands" >&2
    exit 1
  fi
  rm -rf "$dir/$1/example"
  cp -r "$examples/$1" "$dir/$1/example"
  rm -rf "$dir/$1/example/target" "$dir/$1/example/venv"
  if ! (cd "$dir/$1/example" && PATH=$(dirname "$python"):$PATH bash -euo pipefail -c "$commands") >"$dir/$1/example.log" 2>&1; then
    sed 's/\x1b\[[0-9;]*m//g' "$dir/$1/example.log" >&2
    exit 1
  fi
}

install_python() {
  rm -rf "$dir/python/venv"
  "$python" -m venv "$dir/python/venv"
  "$dir/python/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps \
    -r "$sources/python/requirements.txt"
  example python
}

install_rust() {
  cargo build --quiet --locked --manifest-path "$sources/rust/Cargo.toml" --target-dir "$dir/rust/target"
  # The example has its libraries built the same way, and most of them once.
  CARGO_TARGET_DIR=$dir/rust/target example rust
  # Not a link: the path of a program attests it.
  install -m 0755 "$dir/rust/target/debug/signet-test-client" "$dir/rust/client"
  install -D -m 0755 "$dir/rust/target/debug/signet-spiffe-example" "$dir/rust/example/target/debug/signet-spiffe-example"
  rm -rf "$dir/rust/target" # half a gigabyte, and the sources change seldom
}

install_java() {
  mvn --quiet --batch-mode --no-transfer-progress -f "$sources/java/pom.xml" "-Dout=$dir/java" package 2>&1 | sed 's/\x1b\[[0-9;]*m//g'
  example java
}

# first PROGRAM ARGS...: the first version number in what a program says.
first() { { "$@" 2>&1 || true; } | grep -oE '[0-9]+\.[0-9]+(\.[0-9]+)?' | head -n 1; }

version=$(first "$python" --version || true)
oldest Python "$version" 3.10 "on Debian and Ubuntu: apt-get install python3-venv"
get python "Python $version at $(readlink -f "$python")"

version=$(first cargo --version || true)
oldest cargo "$version" 1.88 "install Rust, and have cargo in PATH; of Debian 12 the package is cargo-web"
get rust "cargo $version"

version=$(first javac -version || true)
oldest javac "$version" 17 "on Debian and Ubuntu: apt-get install default-jdk-headless"
mvn=$(first mvn --version || true)
oldest Maven "$mvn" 3.6 "on Debian and Ubuntu: apt-get install maven"
get java "Java $version, Maven $mvn"
