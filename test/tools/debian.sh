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
# ca/pkcs11: a token, another program that looks into it, and one behind a socket.
need softhsm2-util softhsm2
need pkcs11-tool opensc
need /usr/libexec/p11-kit/p11-kit-server p11-kit
compgen -G '/usr/lib/*/pkcs11/p11-kit-client.so' >/dev/null || packages+=(p11-kit-modules)
# test/cluster.
need containerd containerd
need ctr containerd
need runc runc
need iptables iptables
need conntrack conntrack
# test/clients, in Python, Java and Rust.
/usr/bin/python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
need javac default-jdk-headless
need mvn maven
# Of Rust, Debian has several; which of them is new enough is looked up below.
rust=1.88
cargo=$(cargo --version 2>/dev/null | cut -d ' ' -f 2 || true)
if [[ -z $cargo || $(printf '%s\n' "$rust" "$cargo" | sort -V | head -n 1) != "$rust" ]]; then
  packages+=(cargo-web)
fi

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
# candidate PACKAGE: the version that would be installed.
candidate() { apt-cache policy "$1" | awk '$1 == "Candidate:" { print $2 }'; }
if [[ " ${packages[*]} " == *" cargo-web "* ]]; then
  if dpkg --compare-versions "$(candidate cargo)" ge "$rust"; then
    packages=("${packages[@]/#cargo-web/cargo}")
  elif ! dpkg --compare-versions "$(candidate cargo-web)" ge "$rust"; then
    echo "debian: the tests need Rust $rust or newer, which this distribution does not have; install it, and have cargo in PATH" >&2
    exit 1
  fi
fi
apt-get install -q -y --no-install-recommends "${packages[@]}"
