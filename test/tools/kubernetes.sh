#!/usr/bin/env bash
# Puts the programs of a Kubernetes cluster at .tools/kubernetes/bin below the
# working directory, built from the Go modules that test/tools/kubernetes,
# test/tools/etcd and test/tools/coredns pin. What is there already, built from
# the same pins, stays. Beside them stand cert-manager's controllers and webhook, built
# from test/tools/certmanager, and approver-policy, from test/tools/approverpolicy. The
# first build takes about twelve minutes on two cores.
set -euo pipefail

tools=test/tools
dir=.tools/kubernetes
bin=$dir/bin
go=${GO:-go}
mkdir -p "$bin"

# Two builds at once would only slow each other down.
exec 9>"$dir/lock"
if ! flock -n 9; then
  echo "kubernetes: waiting for another build"
  flock 9
fi

# pinned MODULE PATH: the version that the module MODULE requires of PATH.
pinned() { awk -v path="$2" '{ sub(/^require/, "") } $1 == path { print $2; exit }' "$tools/$1/go.mod"; }

# progress NAME: a line every 20 seconds until it is killed.
progress() {
  while sleep 20; do
    echo "kubernetes: still building $1 (${SECONDS} s)"
  done
}

# build MODULE PROGRAM VERSION PACKAGE [LDFLAGS]
build() {
  local module=$1 program=$2 version=$3 package=$4 flags=${5:-}
  local stamp=$dir/$program.built want
  want=$({ echo "$version $flags"; "$go" version; find "$tools/$module" -type f -print0 | sort -z | xargs -0 cat; } | sha256sum)
  if [[ -x $bin/$program && -e $stamp && $(<"$stamp") == "$want" ]]; then
    return
  fi
  echo "kubernetes: building $program $version"
  SECONDS=0
  progress "$program" 9>&- &
  local ticker=$!
  trap 'kill "$ticker" 2>/dev/null || true' EXIT
  CGO_ENABLED=0 "$go" -C "$tools/$module" build -p 2 -mod=readonly -trimpath -buildvcs=false \
    -ldflags "-s -w $flags" -o "$PWD/$bin/$program.new" "$package"
  kill "$ticker"
  wait "$ticker" 2>/dev/null || true
  trap - EXIT
  mv -f "$bin/$program.new" "$bin/$program"
  echo "$want" >"$stamp"
  echo "kubernetes: $program took $SECONDS s"
}

kube=$(pinned kubernetes k8s.io/kubernetes)
minor=${kube#v1.}
minor=${minor%%.*}
version=k8s.io/component-base/version
for program in kube-apiserver kubelet kube-controller-manager kube-scheduler kube-proxy kubectl; do
  build kubernetes "$program" "$kube" "k8s.io/kubernetes/cmd/$program" \
    "-X $version.gitVersion=$kube -X $version.gitMajor=1 -X $version.gitMinor=$minor -X $version.gitTreeState=clean"
done
build etcd etcd "$(pinned etcd go.etcd.io/etcd/server/v3)" go.etcd.io/etcd/server/v3
build coredns coredns "$(pinned coredns github.com/coredns/coredns)" .
build certmanager certmanager "$(pinned certmanager github.com/cert-manager/cert-manager)" .
policy=github.com/cert-manager/approver-policy
build approverpolicy approverpolicy "$(pinned approverpolicy $policy)" $policy/cmd
