#!/usr/bin/env bash
# Installs the Debian packages of the programs that tests run, those that are
# missing only, and without starting any service.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

packages=()
# need PROGRAM PACKAGE...
need() {
  local program=$1
  shift
  command -v "$program" >/dev/null || packages+=("$@")
}
need gcc gcc libc6-dev # the race detector
need ip iproute2
need nft nftables
need nginx nginx-light
need redis-server redis-server
need redis-cli redis-tools
need mariadbd mariadb-server
need mariadb mariadb-client
need sshd openssh-server
need ssh openssh-client
need curl curl
need tcpdump tcpdump
need /usr/lib/cni/bridge containernetworking-plugins

if [[ ${#packages[@]} -eq 0 ]]; then
  exit 0
fi
echo "debian: the tests need ${packages[*]}"
if ! command -v apt-get >/dev/null; then
  echo "debian: this is no Debian or Ubuntu; install what these packages hold by hand" >&2
  exit 1
fi
if [[ $(id -u) -ne 0 ]]; then
  echo "debian: run as root: apt-get install ${packages[*]}" >&2
  exit 1
fi

# Packages start their services unless this program says no.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 0755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -q -y --no-install-recommends "${packages[@]}"
