// Package kube is the mesh's side of a Kubernetes API server: it watches what
// the mesh is made of, writes what became of it, and checks who joins. It is
// the only package that imports client-go.
package kube

import (
	"fmt"
	"log/slog"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

// Limits on requests to the API server; watches do not count.
const (
	requestsPerSecond = 100
	requestBurst      = 200
)

// userAgent is how the API server's audit names the control plane.
const userAgent = "signet-control"

// Client reaches one API server. It is safe for concurrent use.
type Client struct {
	Core kubernetes.Interface
	// Objects reaches the kinds of signet.dev.
	Objects dynamic.Interface
	// Config is how others than these are reached.
	Config *rest.Config
}

// Connect returns a client for the cluster that this process runs in, or, when
// kubeconfig is not empty, for the one that this file names. It makes no
// request. What client-go has to say goes to log, for the whole process.
func Connect(kubeconfig string, log *slog.Logger) (*Client, error) {
	klog.SetSlogLogger(log.With("component", "client-go"))
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("kube: %w; run inside a cluster, or name a kubeconfig file", err)
	}
	config.QPS, config.Burst, config.UserAgent = requestsPerSecond, requestBurst, userAgent
	core, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("kube: %w", err)
	}
	objects, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("kube: %w", err)
	}
	return &Client{Core: core, Objects: objects, Config: config}, nil
}
