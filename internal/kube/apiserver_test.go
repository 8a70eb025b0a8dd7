package kube

import (
	"testing"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/signet-mesh/signet/test/kubeapiserver"
)

// connect returns a client of the given configuration.
func connect(t *testing.T, config *rest.Config) *Client {
	t.Helper()
	core, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	objects, err := dynamic.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return &Client{Core: core, Objects: objects}
}

// eventually tries until try succeeds, and fails the test with its last error.
var eventually = kubeapiserver.Eventually
