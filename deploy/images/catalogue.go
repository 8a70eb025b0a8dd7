package main

// image says what one image holds.
type image struct {
	name  string
	title string
	// programs are commands of this project; each is at /usr/bin. The first is
	// the entry point.
	programs []string
	// envoy adds Envoy, at /usr/bin/envoy, and what it is linked with.
	envoy bool
	// user is who the programs run as, "UID:GID", where a pod says nothing else.
	user string
}

// catalogue has every image of a release.
var catalogue = []image{
	{
		name: "signet-control", title: "Signet's control plane",
		programs: []string{"signet-control"},
		// The user that distroless images call nonroot.
		user: "65532:65532",
	},
	{
		name: "signet-agent", title: "Signet's node agent, CNI plugin and command line",
		programs: []string{"signet-agent", "signet-cni", "signet"},
		// It enters the namespaces of pods and reads the processes of others.
		user: "0:0",
	},
	{
		name: "signet-proxy", title: "Signet's node proxy: Envoy, and the parent that drains it",
		programs: []string{"signet-proxy"},
		envoy:    true,
		// Linux gives capabilities to no other user of a container, and opening
		// a socket in a pod's network namespace needs two.
		user: "0:0",
	},
}
