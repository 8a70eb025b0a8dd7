// Package v1 is what signet-cni and the agent on the same node say to each
// other: JSON over HTTP on a unix socket that only root may open. The agent
// answers with status 200 and an Answer that has a Result, or with 400 or 503
// and one that has an Error, which kubelet shows in an event of the pod.
package v1

import "net/netip"

// DefaultSocket is where the agent listens.
const DefaultSocket = "/run/signet/cni.sock"

// The questions, each a POST with a Pod.
const (
	// PathAdd asks whether the pod may start. The answer comes when it may.
	PathAdd = "/v1/add"
	// PathCheck asks whether the pod is still as PathAdd left it.
	PathCheck = "/v1/check"
	// PathDel says that the pod's sandbox is being deleted.
	PathDel = "/v1/del"
)

// Pod is a sandbox, as the container runtime names it.
type Pod struct {
	ContainerID string `json:"containerID"`
	// NetNS is an absolute path of its network namespace; for PathDel it may
	// be empty, when the namespace is gone.
	NetNS     string `json:"netns"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
	// IPs are the addresses that the plugins before this one gave it; for
	// messages only.
	IPs []netip.Addr `json:"ips,omitempty"`
}

// Result is why a pod may start.
type Result string

// The results.
const (
	// Captured: its rules are in place and the proxy listens.
	Captured Result = "captured"
	// NotEnrolled: its namespace is not in the mesh.
	NotEnrolled Result = "not enrolled"
	// Excluded: it opted out where it may, or it is part of the mesh.
	Excluded Result = "excluded"
	// Released: PathDel was heard.
	Released Result = "released"
)

// Answer is the body of every answer; one of the two is set.
type Answer struct {
	Result Result `json:"result,omitempty"`
	Error  string `json:"error,omitempty"`
}
